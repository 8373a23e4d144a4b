"""The modulation of SCAM's generator as a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..folding import (
    AttentionProjections,
    Choice,
    FoldingCache,
    Projection,
    attention_weights,
    modulate_by_latents,
    pixels_attend_to_latents,
)
from ..folding.calls import Empty
from ..labels import LabelMap, LatentLayout
from ..ops.instance_modulate import instance_modulate
from .attention import SemanticAttentionTransformer, TransformerLayers, update_by_pixels
from .encoding import encoding_of
from .layers import NEGATIVE_SLOPE, AttentionLayers, Linear, project_pixels
from .map_encoder import MapEncoder

Normalisation = Literal["instance", "layer", "batch"]


class SemanticModulation(nn.Module):
    """The modulation of SCAM's generator: latents and features exchange what they know, label by label.

    The latents are updated, duplex: by a :class:`SemanticAttentionTransformer` that attends to the features, simplex:
    by two linear layers with a leaky ReLU in between. Then the pixels attend to them, as in
    :class:`SemanticCrossAttention`, with a_p what pixel p gets:

        out_p = leaky_relu((1 + gamma(a_p)) * normalise(x)_p + beta(a_p) + noise_strength * noise_p)

    The noise is one standard normal number for each pixel, in evaluation mode too, shared by the channels; its strength
    is learned for each channel. The encoding is added for the attentions only. In duplex one pass over the features
    serves the latents' attention and the statistics of the normalisation.

    With a map encoder gamma and beta are blends of these and those of a :class:`MapEncoder`, with learned numbers t:

        sigmoid(lr_mul t_gamma) gamma(a_p) + (1 - sigmoid(lr_mul t_gamma)) gamma_map_p,    and so for beta

    Args:
        layout: how many latents each label has.
        channels: C, of the features.
        latent_dim: D, width of a latent.
        attention_dim: d, width of queries, keys and values, of both attentions.
        num_heads: of both attentions.
        duplex: whether the latents attend to the features.
        normalisation: "instance": over the pixels of a channel; "layer": over all of an image; "batch": over the
            pixels of a channel in all images, with running statistics in evaluation mode. None has parameters.
        noise: whether noise is added.
        modulate: whether gamma and beta are used; without them only the latents are changed by their attention.
        map_encoder: whether gamma and beta are blended with those of a map encoder (``use_mask_adain`` of the published
            code). Gamma and beta of every pixel are then kept in memory.
        map_kernel_size: of the map encoder's convolutions, odd.
        negative_slope: of the leaky ReLU. Two in a row, as in front of the published convolutions, are one of 0.04.
        empty: what pixels without label, and latents without pixels, attend to: "uniform", all alike, or "zero", none.
        equalised, lr_mul: see :class:`Linear`; the noise's strength is multiplied by lr_mul in any case.
        choice: how it is computed, see :func:`sca_kernels.folding.choose`.

    Source: Dufour et al., SCAM!, ECCV 2022.

    Example:
        >>> layout = LatentLayout((4, 1))
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> module = SemanticModulation(layout, channels=8, latent_dim=6, attention_dim=8)
        >>> out, latents = module(torch.randn(1, 8, 2, 2), labels, torch.randn(1, 5, 6))
        >>> out.shape, latents.shape
        (torch.Size([1, 8, 2, 2]), torch.Size([1, 5, 6]))
    """

    def __init__(
        self,
        layout: LatentLayout,
        channels: int,
        latent_dim: int,
        attention_dim: int,
        num_heads: int = 1,
        *,
        duplex: bool = True,
        normalisation: Normalisation = "instance",
        noise: bool = True,
        modulate: bool = True,
        map_encoder: bool = False,
        map_kernel_size: int = 3,
        negative_slope: float = NEGATIVE_SLOPE,
        empty: Empty = "uniform",
        equalised: bool = False,
        lr_mul: float = 1.0,
        eps: float = 1e-5,
        choice: Choice = "auto",
    ) -> None:
        super().__init__()
        if normalisation not in ("instance", "layer", "batch"):
            raise ValueError(f"normalisation: expected 'instance', 'layer' or 'batch', got {normalisation!r}")
        settings: dict[str, Any] = {"equalised": equalised, "lr_mul": lr_mul}
        self.layout, self.modulate, self.empty = layout, modulate, empty
        self.normalisation, self.lr_mul, self.eps, self.choice = normalisation, lr_mul, eps, choice
        self.negative_slope = negative_slope
        self.attention = AttentionLayers(channels, latent_dim, attention_dim, num_heads, **settings)
        self.gamma = Linear(channels, channels, **settings)
        self.beta = Linear(channels, channels, **settings)
        self.latent_update: SemanticAttentionTransformer | nn.Sequential
        if duplex:
            self.latent_update = SemanticAttentionTransformer(
                layout, latent_dim, attention_dim, num_heads, channels=channels, empty=empty, choice=choice, **settings
            )
        else:
            self.latent_update = nn.Sequential(
                Linear(latent_dim, latent_dim, **settings),
                nn.LeakyReLU(NEGATIVE_SLOPE),
                Linear(latent_dim, latent_dim, **settings),
            )
        self.batch_norm = nn.BatchNorm2d(channels, eps, affine=False) if normalisation == "batch" else None
        self.noise_strength = nn.Parameter(torch.zeros(channels)) if noise else None
        self.map_encoder: MapEncoder | None = None
        if map_encoder:
            self.map_encoder = MapEncoder(layout, channels, kernel_size=map_kernel_size, **settings)
            self.gamma_blend, self.beta_blend = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, labels: LabelMap, latents: Tensor, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Modulates features.

        Args:
            x: (B, C, height, width).
            labels: of any resolution, for B images or one for all.
            latents: (B, m, D).
            noise: broadcastable to (B, 1, height, width). Default: drawn from PyTorch's generator.

        Returns:
            the features, like x, and the updated latents (B, m, D).
        """
        return modulate(x, labels, latents, self.layers, noise=noise)

    @property
    def layers(self) -> ModulationLayers:
        update, blend = self.latent_update, None
        if self.map_encoder is not None:
            blend = MapBlend(self.map_encoder, self.gamma_blend, self.beta_blend)
        return ModulationLayers(
            layout=self.layout,
            latent_update=update.layers if isinstance(update, SemanticAttentionTransformer) else update,
            attention=self.attention.projections,
            gamma=self.gamma.projection,
            beta=self.beta.projection,
            normalisation=self.normalisation,
            batch_norm=self.batch_norm,
            noise_strength=self.noise_strength,
            modulate=self.modulate,
            blend=blend,
            lr_mul=self.lr_mul,
            eps=self.eps,
            negative_slope=self.negative_slope,
            empty=self.empty,
            choice=self.choice,
            cache=self.attention.cache,
        )

    def attention_weights(self, x: Tensor, labels: LabelMap, latents: Tensor) -> Tensor:
        """How much each pixel attends to each latent of its label, see :func:`sca_kernels.folding.attention_weights`.

        Args:
            x, labels: as given to the module.
            latents: as it returned them.

        Returns:
            (B, H, k, height, width).
        """
        return attention_weights(
            x, latents, self.layout, labels, self.attention.projections, encoding=encoding_of(x, x.shape[1])
        )


class MapBlend(NamedTuple):
    """Gamma and beta of the label map, and how far they are used.

    Attributes:
        encoder: from a label map at the features' resolution, and a ``memory_format``, to gamma and beta of each pixel.
        gamma, beta: learned numbers.
    """

    encoder: Callable[..., tuple[Tensor, Tensor]]
    gamma: Tensor
    beta: Tensor


@dataclass(frozen=True)
class ModulationLayers:
    """What a modulation is made of, see :class:`SemanticModulation`.

    Attributes:
        latent_update: duplex: of the block of SAT; simplex: (B, m, D) to (B, m, D).
        attention, gamma, beta: of the pixels.
        batch_norm: holds running statistics, where ``normalisation`` is "batch".
        noise_strength: (C), or None for no noise.
        blend: of the label map, or None.
        cache: remembers products of weights.
    """

    layout: LatentLayout
    latent_update: TransformerLayers | Callable[[Tensor], Tensor]
    attention: AttentionProjections
    gamma: Projection
    beta: Projection
    normalisation: Normalisation
    batch_norm: nn.BatchNorm2d | None
    noise_strength: Tensor | None
    modulate: bool
    blend: MapBlend | None
    lr_mul: float
    eps: float
    negative_slope: float
    empty: Empty
    choice: Choice
    cache: FoldingCache | None


def modulate(
    x: Tensor, labels: LabelMap, latents: Tensor, layers: ModulationLayers, *, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:meth:`SemanticModulation.forward` with the given layers."""
    mean = variance = None
    if isinstance(layers.latent_update, TransformerLayers):
        latents, mean, variance = update_by_pixels(
            latents,
            x,
            layers.layout,
            labels,
            layers.latent_update,
            encoding=encoding_of(x, x.shape[1]),
            empty=layers.empty,
            choice=layers.choice,
        )
    else:
        latents = layers.latent_update(latents)
    table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    settings: dict[str, Any] = {
        "stats": _statistics(layers, x, mean, variance, table_dtype),
        "eps": layers.eps,
        "negative_slope": layers.negative_slope,
    }
    if layers.noise_strength is not None:
        settings["noise"] = _draw_noise(x, table_dtype) if noise is None else noise
        settings["noise_strength"] = layers.noise_strength.to(table_dtype) * layers.lr_mul
    if not layers.modulate:
        return instance_modulate(x, **settings), latents
    if layers.blend is not None:
        gamma, beta = _blend(layers, layers.blend, x, labels, latents)
        return instance_modulate(x, gamma, beta, **settings), latents
    out = modulate_by_latents(
        x,
        latents,
        layers.layout,
        labels,
        layers.attention,
        layers.gamma,
        layers.beta,
        encoding=encoding_of(x, x.shape[1]),
        empty=layers.empty,
        choice=layers.choice,
        cache=layers.cache,
        **settings,
    )
    return out, latents


def _blend(layers: ModulationLayers, blend: MapBlend, x: Tensor, labels: LabelMap, latents: Tensor) -> list[Tensor]:
    """Gamma and beta of every pixel (B, C, height, width)."""
    labels = labels.at(*x.shape[2:])
    attended = pixels_attend_to_latents(
        x,
        latents,
        layers.layout,
        labels,
        layers.attention,
        encoding=encoding_of(x, x.shape[1]),
        empty=layers.empty,
        choice=layers.choice,
        cache=layers.cache,
    )
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
    of_map = blend.encoder(labels, memory_format=memory_format)
    blended = []
    for layer, number, plane in zip((layers.gamma, layers.beta), (blend.gamma, blend.beta), of_map, strict=True):
        share = (number * layers.lr_mul).sigmoid().to(x.dtype)
        blended.append(torch.lerp(plane.to(x.dtype).expand_as(x), project_pixels(attended, layer), share))
    return blended


def _statistics(
    layers: ModulationLayers, x: Tensor, mean: Tensor | None, variance: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Mean and 1 / standard deviation, each broadcastable to (B, C); None leaves them to the kernel."""
    norm = layers.batch_norm
    if norm is not None and not norm.training:
        assert norm.running_mean is not None and norm.running_var is not None
        return norm.running_mean.to(dtype), (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if mean is None or variance is None:
        if layers.normalisation == "instance":
            return None
        variance, mean = torch.var_mean(x.to(dtype), (2, 3), correction=0)
    if layers.normalisation != "instance":
        over = (0,) if norm is not None else (1,)
        total = mean.mean(over, keepdim=True)
        variance = (variance + (mean - total).square()).mean(over, keepdim=True)
        mean = total
    if norm is not None:
        _update_running(norm, mean.squeeze(0), variance.squeeze(0), x.numel() // x.shape[1])
    return mean, (variance + layers.eps).rsqrt()


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        momentum = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        unbiased = variance * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def _draw_noise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, height, width), column after column: the published code's numbers for the same seed."""
    batch, _, height, width = x.shape
    return torch.randn((batch, width, height, 1), dtype=dtype, device=x.device).transpose(1, 3)
