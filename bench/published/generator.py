"""The generator: a one-hot map in low resolution is upsampled and modulated, block by block, to an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from .layers import (
    NEGATIVE_SLOPE,
    BaseNetwork,
    LearnedPositionalEmbedding,
    convolution_layer,
)
from .masks import planes_of_latents
from .modulation import Normalisation, SCAMModulation

Architecture = Literal["skip", "resnet", "none"]


class ToRGB(nn.Module):
    """A 1 x 1 convolution to the image's channels, after a modulation without noise, added to the image so far.

    Args:
        modulate_fmap: whether there is a modulation.
        apply_spectral_norm: of the convolution.

    For the others see :class:`bench.published.SCAMModulation`.
    """

    def __init__(
        self,
        input_dim: int,
        image_dim: int,
        num_labels: int,
        style_dim: int,
        kernel_size: int,
        attention_latent_dim: int,
        num_heads: int,
        attention_type: str = "duplex",
        apply_spectral_norm: bool = True,
        use_mask_adain: bool = False,
        norm_type: Normalisation = "InstanceNorm",
        modulate_fmap: bool = True,
        modulate: bool = True,
        use_equalized_lr: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        self.modulate_fmap = modulate_fmap
        if modulate_fmap:
            self.mod_rgb = SCAMModulation(
                num_labels,
                input_dim,
                style_dim,
                attention_latent_dim,
                kernel_size,
                num_heads,
                attention_type=attention_type,
                use_mask_adain=use_mask_adain,
                norm_type=norm_type,
                add_noise=False,
                modulate=modulate,
                use_equalized_lr=use_equalized_lr,
                lr_mul=lr_mul,
            )
        self.conv_rgb = convolution_layer(use_equalized_lr, lr_mul)(input_dim, image_dim, kernel_size=1)
        if apply_spectral_norm:
            self.conv_rgb = spectral_norm(self.conv_rgb)

    def forward(
        self,
        x: Tensor,
        segmentation_map: Tensor,
        style_codes: Tensor | None = None,
        previous_rgb: Tensor | None = None,
    ) -> Tensor:
        """(B, image_dim, height, width); the latents that the modulation updates are dropped."""
        if self.modulate_fmap:
            x, _ = self.mod_rgb(x, segmentation_map, style_codes)
        rgb = self.conv_rgb(x)
        return rgb if previous_rgb is None else rgb + previous_rgb


class SCAMResUpscale(nn.Module):
    """A block of the generator: modulation, convolution, upsampling, modulation, convolution.

    Each convolution comes with a leaky ReLU of its own after that of the modulation.

    Args:
        input_dim, output_dim: channels; in between there are as many as the smaller of them.
        image_dim: channels of the image.
        upscale_size: 0, a factor or a height and a width; the nearest neighbour is taken.
        architecture: "skip": a :class:`ToRGB` adds to the image; "resnet": a modulation and a 1 x 1 convolution go
            from the upsampled features to the result; "none": neither.
        last_block: whether the image is made here, by a :class:`ToRGB` without modulation in any architecture.
        apply_spectral_norm: of all convolutions.

    For the others see :class:`bench.published.SCAMModulation`.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_labels: int,
        style_dim: int,
        kernel_size: int,
        attention_latent_dim: int,
        num_heads: int,
        image_dim: int = 3,
        attention_type: str = "duplex",
        apply_spectral_norm: bool = True,
        use_mask_adain: bool = False,
        upscale_size: int | tuple[int, int] = 0,
        norm_type: Normalisation = "InstanceNorm",
        architecture: Architecture = "skip",
        last_block: bool = False,
        add_noise: bool = True,
        modulate: bool = True,
        use_equalized_lr: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        if architecture not in ("skip", "resnet", "none"):
            raise ValueError(f"architecture: expected 'skip', 'resnet' or 'none', got {architecture!r}")
        self.architecture, self.last_block = architecture, last_block
        self.up = _upsampling(upscale_size)
        middle_dim = min(input_dim, output_dim)
        settings: dict[str, Any] = {
            "num_labels": num_labels,
            "style_dim": style_dim,
            "attention_latent_dim": attention_latent_dim,
            "kernel_size": kernel_size,
            "num_heads": num_heads,
            "use_mask_adain": use_mask_adain,
            "norm_type": norm_type,
            "modulate": modulate,
            "use_equalized_lr": use_equalized_lr,
            "lr_mul": lr_mul,
        }

        def modulation(channels: int) -> SCAMModulation:
            return SCAMModulation(
                feature_map_dim=channels, attention_type=attention_type, add_noise=add_noise, **settings
            )

        def convolution(channels: int, out_channels: int, size: int, **options: bool) -> nn.Module:
            make_convolution = convolution_layer(use_equalized_lr, lr_mul)
            made = make_convolution(channels, out_channels, kernel_size=size, padding=size // 2, **options)
            return spectral_norm(made) if apply_spectral_norm else made

        self.mod_0, self.mod_1 = modulation(input_dim), modulation(middle_dim)
        self.conv_0, self.conv_1 = (
            nn.Sequential(nn.LeakyReLU(NEGATIVE_SLOPE), convolution(channels, out_channels, kernel_size))
            for channels, out_channels in ((input_dim, middle_dim), (middle_dim, output_dim))
        )
        if architecture == "resnet":
            self.mod_res = modulation(input_dim)
            self.conv_res = convolution(input_dim, output_dim, 1, bias=False)
        if architecture == "skip" or last_block:
            self.torgb = ToRGB(
                output_dim,
                image_dim,
                attention_type="simplex",
                apply_spectral_norm=apply_spectral_norm,
                modulate_fmap=not last_block,
                **settings,
            )

    def forward(
        self,
        x: Tensor,
        segmentation_map: Tensor,
        style_codes: Tensor,
        content_code: Tensor | None = None,
        previous_rgb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The features (B, output_dim, ...), the latents after both modulations, and the image so far or None."""
        residual = None
        if self.architecture == "resnet":
            residual, _ = self.mod_res(self.up(x), segmentation_map, style_codes, content_code)
            residual = self.conv_res(residual)
        out, style_codes = self.mod_0(x, segmentation_map, style_codes, content_code)
        out = self.up(self.conv_0(out))
        out, style_codes = self.mod_1(out, segmentation_map, style_codes, content_code)
        out = self.conv_1(out)
        if residual is not None:
            out = (residual + out) / 2**0.5
        rgb = None
        if self.architecture == "skip" or self.last_block:
            if previous_rgb is not None:
                previous_rgb = self.up(previous_rgb)
            rgb = self.torgb(out, segmentation_map, style_codes, previous_rgb)
        return out, style_codes, rgb


class SCAMGenerator(BaseNetwork):
    """Makes images from one-hot label maps and latents.

    Args:
        num_filters_last_layer: channels of the last block; the first one has sixteen times as many.
        num_up_layers: number of blocks, four or more.
        num_up_layers_with_mask_adain: number of blocks, from the first on, whose modulations see the mask. The last
            block is one of them if it is all but one, and is not if it is all.
        height, width: of the image, which only the last block upsamples to.
        num_labels: number of labels.
        style_dim: width of a latent; with ``split_latents`` of all latents of a label together.
        kernel_size: of the convolutions, an odd number.
        attention_type: "duplex": every block updates the latents for the next; otherwise each starts from those given.
        num_output_channels: of the image.
        latent_pos_emb: "learned" adds a table to the latents; anything else adds nothing.
        split_latents: whether the latents come as one vector for each label.
        num_labels_split: number of latents of a label.
        num_labels_bg: number of latents of label 0. Default: the same.
        use_vae: whether the latents come as a pair of means and logarithms of variances. In evaluation mode the means
            are taken, in training random numbers.

    For the others see :class:`SCAMResUpscale`.
    """

    def __init__(
        self,
        num_filters_last_layer: int,
        num_up_layers: int,
        num_up_layers_with_mask_adain: int,
        height: int,
        width: int,
        num_labels: int,
        style_dim: int,
        kernel_size: int,
        attention_latent_dim: int,
        num_heads: int,
        attention_type: str,
        num_output_channels: int,
        latent_pos_emb: str = "learned",
        architecture: Architecture = "skip",
        apply_spectral_norm: bool = True,
        split_latents: bool = True,
        num_labels_split: int = 1,
        num_labels_bg: int | None = None,
        norm_type: Normalisation = "InstanceNorm",
        add_noise: bool = True,
        modulate: bool = True,
        use_equalized_lr: bool = False,
        use_vae: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        if num_up_layers < 4:
            raise ValueError(f"num_up_layers: expected 4 or more, got {num_up_layers}")
        if num_up_layers_with_mask_adain > num_up_layers:
            raise ValueError(
                f"num_up_layers_with_mask_adain: expected at most {num_up_layers}, got {num_up_layers_with_mask_adain}"
            )
        if latent_pos_emb == "fourrier":
            raise ValueError("latent_pos_emb: expected another value than 'fourrier', which cannot be added to latents")
        if split_latents and style_dim % num_labels_split:
            raise ValueError(f"style_dim: expected a multiple of {num_labels_split}, got {style_dim}")
        self.num_labels, self.num_labels_split = num_labels, num_labels_split
        self.num_labels_bg = num_labels_split if num_labels_bg is None else num_labels_bg
        self.num_style_tokens = (num_labels - 1) * num_labels_split + self.num_labels_bg
        self.split_latents, self.use_vae = split_latents, use_vae
        self.latents_dim = style_dim // num_labels_split if split_latents else style_dim
        self.attention_type, self.latent_pos_emb = attention_type, latent_pos_emb
        self.num_up_layers = num_up_layers
        self.small_h, self.small_w = _smallest_size(height, width, num_up_layers)

        self.style_code_pos_encoding: nn.Module = nn.Identity()
        if latent_pos_emb == "learned":
            self.style_code_pos_encoding = LearnedPositionalEmbedding(self.num_style_tokens, self.latents_dim)
        widest = 16 * num_filters_last_layer
        self.first_conv = convolution_layer(use_equalized_lr, lr_mul)(
            num_labels, widest, kernel_size=kernel_size, padding=kernel_size // 2
        )
        last = num_up_layers - 1
        with_mask = [block < num_up_layers_with_mask_adain for block in range(last)]
        with_mask.append(num_up_layers_with_mask_adain == last)
        self.backbone = nn.ModuleDict()
        for block in range(num_up_layers):
            # The channels are halved in each of the last four blocks.
            halvings = max(0, block - (num_up_layers - 4))
            input_dim = widest >> halvings
            self.backbone[f"SCAM_block_{block}"] = SCAMResUpscale(
                input_dim,
                input_dim if block < num_up_layers - 4 else input_dim // 2,
                self.num_style_tokens,
                self.latents_dim,
                kernel_size,
                attention_latent_dim,
                num_heads,
                image_dim=num_output_channels,
                attention_type=attention_type,
                apply_spectral_norm=apply_spectral_norm,
                use_mask_adain=with_mask[block],
                upscale_size=2 if block < last else (height, width),
                norm_type=norm_type,
                architecture=architecture,
                last_block=block == last,
                add_noise=add_noise,
                modulate=modulate,
                use_equalized_lr=use_equalized_lr,
                lr_mul=lr_mul,
            )
        self.last_act = nn.Tanh()

    def forward(
        self,
        segmentation_map: Tensor,
        style_codes: Tensor | tuple[Tensor, Tensor],
        content_code: Tensor | None = None,
    ) -> Tensor:
        """An image (B, num_output_channels, height, width) from -1 to 1.

        Args:
            segmentation_map: one-hot, (B, num_labels, H, W).
            style_codes: (B, m, style_dim), with ``split_latents`` (B, num_labels, style_dim); see ``use_vae``.
            content_code: not used.
        """
        x = self.first_conv(F.interpolate(segmentation_map, size=(self.small_h, self.small_w)))
        planes = planes_of_latents(segmentation_map, self.num_labels_bg, self.num_labels_split)
        latents = self._sampled(style_codes) if self.use_vae else style_codes
        if self.split_latents:
            latents = latents.view(len(segmentation_map), self.num_labels * self.num_labels_split, -1)
        latents = self.style_code_pos_encoding(latents)
        rgb = None
        for block in self.backbone.values():
            x, updated, rgb = block(x, planes, latents, content_code, rgb)
            if self.attention_type == "duplex":
                latents = updated
        return self.last_act(rgb)

    def get_last_layer(self) -> Tensor:
        """The weight of the last convolution."""
        return self.backbone[f"SCAM_block_{self.num_up_layers - 1}"].torgb.conv_rgb.weight

    def _sampled(self, distribution: tuple[Tensor, Tensor]) -> Tensor:
        if not isinstance(distribution, Sequence) or len(distribution) != 2:
            raise TypeError(f"style_codes: expected means and logarithms of variances, got {distribution!r:.40}")
        mean, log_variance = distribution
        if not self.training:
            return mean
        deviation = (0.5 * log_variance).exp()
        return torch.randn_like(deviation) * deviation + mean


def _upsampling(upscale_size: int | tuple[int, int]) -> nn.Module:
    if isinstance(upscale_size, tuple) and len(upscale_size) == 2:
        return nn.Upsample(size=upscale_size)
    if isinstance(upscale_size, int):
        return nn.Upsample(scale_factor=upscale_size) if upscale_size else nn.Identity()
    raise TypeError(f"upscale_size: expected a number or a height and a width, got {upscale_size!r}")


def _smallest_size(height: int, width: int, num_up_layers: int) -> tuple[int, int]:
    """Height and width of the first feature map.

    The smaller side of the image fixes one; the other is this one over width / height. As published that holds for
    landscapes as well, where it should be the product.
    """
    smaller = min(height, width) >> num_up_layers
    if smaller < 2:
        raise ValueError(f"num_up_layers: expected fewer for {height} x {width}, got {num_up_layers}")
    other = round(smaller / (width / height))
    return (other, smaller) if width < height else (smaller, other)
