"""The modulation of a feature map by latents, every pixel projected and a dense mask over all pairs."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MaskedAttention, MaskedTransformer, SameLabel
from .layers import (
    NEGATIVE_SLOPE,
    SinusoidalPositionalEmbedding,
    convolution_layer,
    linear_layer,
    two_layers,
)

Normalisation = Literal["InstanceNorm", "LayerNorm", "BatchNorm"]


class SegMapEncoder(nn.Module):
    """Gamma and beta of each pixel from the mask alone: two convolutions each, of which the first is shared."""

    HIDDEN = 128

    def __init__(
        self,
        num_labels: int,
        out_channels: int,
        kernel_size: int,
        use_equalized_lr: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        make_convolution = convolution_layer(use_equalized_lr, lr_mul)
        size = {"kernel_size": kernel_size, "padding": kernel_size // 2}
        self.shared_mlp = nn.Sequential(make_convolution(num_labels, self.HIDDEN, **size), nn.ReLU())
        self.gamma_mlp = make_convolution(self.HIDDEN, out_channels, **size)
        self.mu_mlp = make_convolution(self.HIDDEN, out_channels, **size)

    def forward(self, segmentation_map: Tensor) -> tuple[Tensor, Tensor]:
        """(B, num_labels, H, W) to gamma and beta, (B, out_channels, H, W)."""
        hidden = self.shared_mlp(segmentation_map)
        return self.gamma_mlp(hidden), self.mu_mlp(hidden)


class SCAMModulation(nn.Module):
    """Latents and pixels attend to each other, then the pixels are normalised, modulated and made noisy.

    out = leaky_relu((1 + gamma) * normalise(x) + beta + noise_var * lr_mul * noise)

    The position is added to the pixels for the attentions only. Pixels attend to the latents after these were updated.

    Args:
        num_labels: number of latents m of all labels.
        feature_map_dim: channels C, which four divides.
        style_dim: width of a latent.
        attention_latent_dim: width of queries, keys and values.
        kernel_size: of the convolutions of the mask, with ``use_mask_adain``.
        num_heads: of both attentions.
        attention_type: "duplex": the latents attend to the pixels first; otherwise two linear layers change them.
        use_mask_adain: whether gamma and beta are blended with those of :class:`SegMapEncoder`.
        norm_type: the normalisation, without parameters: over the pixels of a channel, over all of an image, or over
            the pixels of a channel in all images.
        add_noise: one number for each pixel, shared by the channels; in evaluation mode too.
        modulate: whether gamma and beta are used; they are computed in any case.
        use_equalized_lr: of linear layers and convolutions.
        lr_mul: for these, and for the noise and the blending also where the learning rate is not equalised.

    Attributes:
        return_attention: whether both attentions return their weights as well, for forward hooks; the result of the
            modulation is the same.
    """

    def __init__(
        self,
        num_labels: int,
        feature_map_dim: int,
        style_dim: int,
        attention_latent_dim: int,
        kernel_size: int,
        num_heads: int,
        attention_type: str = "duplex",
        use_mask_adain: bool = False,
        norm_type: Normalisation = "InstanceNorm",
        add_noise: bool = True,
        modulate: bool = True,
        use_equalized_lr: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        equalized = use_equalized_lr, lr_mul
        self.num_labels, self.style_dim = num_labels, style_dim
        self.use_mask_adain, self.add_noise, self.modulate = use_mask_adain, add_noise, modulate
        self.attention_type, self.norm_type, self.lr_mul = attention_type, norm_type, lr_mul
        self.return_attention = False
        self.normalization_layer = _normalisation(norm_type, feature_map_dim)
        if use_mask_adain:
            self.segmap_encoder = SegMapEncoder(num_labels, feature_map_dim, kernel_size, *equalized)
            self.blending_gamma = nn.Parameter(torch.zeros(1))
            self.blending_beta = nn.Parameter(torch.zeros(1))
        if add_noise:
            self.noise_var = nn.Parameter(torch.zeros(feature_map_dim))
        self.feature_map_pos_encoding = SinusoidalPositionalEmbedding(feature_map_dim)
        self.latent_to_image = MaskedAttention(feature_map_dim, style_dim, attention_latent_dim, num_heads, *equalized)
        make_linear = linear_layer(*equalized)
        self.mlp_lti_gamma = make_linear(feature_map_dim, feature_map_dim)
        self.mlp_lti_beta = make_linear(feature_map_dim, feature_map_dim)
        if attention_type == "duplex":
            self.image_to_latent = MaskedTransformer(
                style_dim, num_labels, feature_map_dim, attention_latent_dim, num_heads, *equalized
            )
        else:
            self.fc_itl = nn.Sequential(*two_layers(style_dim, make_linear))
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(
        self,
        x: Tensor,
        segmentation_map: Tensor,
        style_codes: Tensor,
        content_code: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The modulated feature map and the updated latents.

        Args:
            x: (B, C, height, width).
            segmentation_map: (B, m, H, W), one where a pixel has the label of a latent, see
                :func:`bench.published.mask_of_latents`. The nearest neighbour is taken where H, W are not those of x.
            style_codes: the latents, (B, m, style_dim).
            content_code: not used.
        """
        resized = F.interpolate(segmentation_map, size=x.shape[2:], mode="nearest")
        mask = resized.flatten(2)
        return self.exchange(x, style_codes, mask, mask.transpose(1, 2), resized)

    def exchange(
        self,
        x: Tensor,
        style_codes: Tensor,
        pixels_of_latents: Tensor | SameLabel,
        latents_of_pixels: Tensor | SameLabel,
        resized: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` after the map was resized: the masks (B, m, n) and (B, n, m), or labels in their place.

        The resized map itself is needed for ``use_mask_adain``.
        """
        encoded = self.feature_map_pos_encoding(x).flatten(2).transpose(1, 2)
        if self.attention_type == "duplex":
            updated = self.image_to_latent(style_codes, encoded, pixels_of_latents, self.return_attention)
            style_codes = updated[0] if self.return_attention else updated
        else:
            style_codes = self.fc_itl(style_codes)
        attended = self.latent_to_image(encoded, style_codes, latents_of_pixels, self.return_attention)
        if self.return_attention:
            attended = attended[0]
        gamma, beta = (
            linear(attended).transpose(1, 2).unflatten(2, x.shape[2:])
            for linear in (self.mlp_lti_gamma, self.mlp_lti_beta)
        )
        out = F.layer_norm(x, x.shape[1:]) if self.norm_type == "LayerNorm" else self.normalization_layer(x)
        if self.modulate:
            if self.use_mask_adain:
                gamma_of_mask, beta_of_mask = self.segmap_encoder(resized)
                gamma = _blend(gamma, gamma_of_mask, self.blending_gamma * self.lr_mul)
                beta = _blend(beta, beta_of_mask, self.blending_beta * self.lr_mul)
            # In this order the result, and so the gradient, has the memory order of x and not that of gamma: for B = 1
            # on a CPU instance_norm returns a wrong gradient where the incoming one is channels last (PyTorch 2.13).
            out = out * (1 + gamma) + beta
        if self.add_noise:
            out = out + (self.noise_var * self.lr_mul * self.draw_noise(x)).transpose(1, 3)
        return self.activation(out), style_codes

    def draw_noise(self, x: Tensor) -> Tensor:
        """(B, width, height, 1) standard normal numbers; another method in its place gives the noise.

        In float64 they have the type of x, where the published code draws in float32.
        """
        batch, _, height, width = x.shape
        dtype = torch.promote_types(x.dtype, torch.get_default_dtype())
        return torch.randn((batch, width, height, 1), dtype=dtype, device=x.device)


def _normalisation(norm_type: Normalisation, channels: int) -> nn.Module:
    if norm_type == "InstanceNorm":
        return nn.InstanceNorm2d(channels)
    if norm_type == "BatchNorm":
        return nn.BatchNorm2d(channels, affine=False)
    if norm_type == "LayerNorm":
        return nn.Identity()
    raise ValueError(f"norm_type: expected 'InstanceNorm', 'LayerNorm' or 'BatchNorm', got {norm_type!r}")


def _blend(of_latents: Tensor, of_mask: Tensor, logit: Tensor) -> Tensor:
    share = logit.sigmoid()
    return share * of_latents + (1 - share) * of_mask
