"""The attentions of pixels and latents as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..folding import (
    AttentionProjections,
    Choice,
    FoldingCache,
    SeparableEncoding,
    attention_shares,
    latents_attend_to_latents,
    latents_attend_to_pixels,
    pixels_attend_to_latents,
)
from ..folding.calls import Empty
from ..labels import LabelMap, LatentLayout
from .encoding import encoding_of
from .layers import NEGATIVE_SLOPE, AttentionLayers, Linear


class SemanticCrossAttention(nn.Module):
    """SCA: each pixel attends to the latents of its label.

        out_p = out(concat_h sum_j softmax_j(<query(x_p + e_p)_h, key(z_j)_h> / sqrt(d / H)) value(z_j)_h)

    over the latents j of the label of pixel p, where e is the sinusoidal encoding.

    Args:
        layout: how many latents each label has.
        channels: C, of the features and of the result.
        latent_dim: D, width of a latent.
        attention_dim: d, width of queries, keys and values.
        num_heads: H.
        encoded: whether the encoding is added to the features.
        empty: what a pixel without label attends to: "uniform", all latents alike, or "zero", none.
        equalised, lr_mul: see :class:`Linear`.
        choice: how it is computed, see :func:`sca_kernels.folding.choose`.

    Source: Dufour et al., SCAM!, ECCV 2022, SCA.

    Example:
        >>> layout = LatentLayout((4, 1))
        >>> module = SemanticCrossAttention(layout, channels=8, latent_dim=6, attention_dim=8)
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> module(torch.randn(1, 8, 2, 2), labels, torch.randn(1, 5, 6)).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(
        self,
        layout: LatentLayout,
        channels: int,
        latent_dim: int,
        attention_dim: int,
        num_heads: int = 1,
        *,
        encoded: bool = True,
        empty: Empty = "uniform",
        equalised: bool = False,
        lr_mul: float = 1.0,
        choice: Choice = "auto",
    ) -> None:
        super().__init__()
        self.layout, self.encoded, self.empty, self.choice = layout, encoded, empty, choice
        self.attention = AttentionLayers(
            channels, latent_dim, attention_dim, num_heads, equalised=equalised, lr_mul=lr_mul
        )

    def forward(self, x: Tensor, labels: LabelMap, latents: Tensor) -> Tensor:
        """(B, C, height, width), a label map of any resolution and (B, m, D) to (B, C, height, width)."""
        return pixels_attend_to_latents(
            x,
            latents,
            self.layout,
            labels,
            self.attention.projections,
            encoding=encoding_of(x, x.shape[1]) if self.encoded else None,
            empty=self.empty,
            choice=self.choice,
            cache=self.attention.cache,
        )


class TransformerLayers(NamedTuple):
    """What a block of SAT is made of.

    Attributes:
        attention: its projections.
        norm_1, norm_2: over all latents of an image together.
        mlp: (B, m, D) to (B, m, D).
        cache: remembers products of weights.
    """

    attention: AttentionProjections
    norm_1: nn.LayerNorm
    mlp: Callable[[Tensor], Tensor]
    norm_2: nn.LayerNorm
    cache: FoldingCache | None = None

    def update(self, latents: Tensor, attended: Tensor) -> Tensor:
        """The new latents, from what the attention returned for each."""
        rows = _layer_norm(self.norm_1, attended + latents)
        rows = _layer_norm(self.norm_2, self.mlp(rows) + rows)
        return _latents_like(rows, latents, self.norm_2.weight)


def update_by_pixels(
    latents: Tensor,
    x: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    layers: TransformerLayers,
    *,
    encoding: SeparableEncoding | None,
    empty: Empty = "uniform",
    choice: Choice = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A block of SAT in which the latents attend to pixels.

    Returns:
        the new latents, and the mean and the biased variance (B, C) of the features where they came along.
    """
    attended, mean, variance = latents_attend_to_pixels(
        latents,
        x,
        layout,
        labels,
        layers.attention,
        encoding=encoding,
        empty=empty,
        choice=choice,
        cache=layers.cache,
    )
    return layers.update(latents, attended), mean, variance


def update_by_latents(latents: Tensor, layout: LatentLayout, layers: TransformerLayers) -> Tensor:
    """A block of SAT in which the latents attend to each other."""
    return layers.update(latents, latents_attend_to_latents(latents, layout, layers.attention))


class SemanticAttentionTransformer(nn.Module):
    """A block of SAT: the latents attend to pixels of their label, or to each other, and pass a small network.

        y = norm_1(attention(z, tokens) + z),    out = norm_2(mlp(y) + y)
        mlp = linear, leaky ReLU, linear, leaky ReLU

    Both layer norms are over all latents of an image together, (m, D), with a weight and a bias of that shape.

    Args:
        layout: how many latents each label has.
        latent_dim: D, width of a latent.
        attention_dim: d, width of queries, keys and values.
        num_heads: H.
        channels: C, of the features that the latents attend to. Default: none, the latents attend to each other.
        encoding_channels: E, of an encoding that is concatenated to the features; 0 for none. Default: the encoding
            is added to the features, E = C.
        empty: what a latent without pixels attends to: "uniform", all pixels alike, or "zero", none.
        equalised, lr_mul: see :class:`Linear`.
        choice: how it is computed, see :func:`sca_kernels.folding.choose`.

    Source: Dufour et al., SCAM!, ECCV 2022, SAT.

    Example:
        >>> layout = LatentLayout((4, 1))
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> latents, x = torch.randn(1, 5, 6), torch.randn(1, 8, 2, 2)
        >>> cross = SemanticAttentionTransformer(layout, latent_dim=6, attention_dim=8, channels=8)
        >>> itself = SemanticAttentionTransformer(layout, latent_dim=6, attention_dim=8)
        >>> itself(cross(latents, x, labels)).shape
        torch.Size([1, 5, 6])
    """

    def __init__(
        self,
        layout: LatentLayout,
        latent_dim: int,
        attention_dim: int,
        num_heads: int = 1,
        *,
        channels: int | None = None,
        encoding_channels: int | None = None,
        empty: Empty = "uniform",
        equalised: bool = False,
        lr_mul: float = 1.0,
        choice: Choice = "auto",
    ) -> None:
        super().__init__()
        if channels is None and encoding_channels is not None:
            raise ValueError("encoding_channels: expected None for latents that attend to each other")
        self.layout, self.channels, self.encoding_channels = layout, channels, encoding_channels
        self.empty, self.choice = empty, choice
        settings: dict[str, Any] = {"equalised": equalised, "lr_mul": lr_mul}
        from_dim = latent_dim if channels is None else channels + (encoding_channels or 0)
        self.attention = AttentionLayers(latent_dim, from_dim, attention_dim, num_heads, **settings)
        self.norm_1 = nn.LayerNorm((layout.count, latent_dim))
        self.mlp = nn.Sequential(
            Linear(latent_dim, latent_dim, **settings),
            nn.LeakyReLU(NEGATIVE_SLOPE),
            Linear(latent_dim, latent_dim, **settings),
            nn.LeakyReLU(NEGATIVE_SLOPE),
        )
        self.norm_2 = nn.LayerNorm((layout.count, latent_dim))

    def forward(self, latents: Tensor, x: Tensor | None = None, labels: LabelMap | None = None) -> Tensor:
        """(B, m, D), with ``channels`` also (B, C, height, width) and a label map of any resolution, to (B, m, D)."""
        return self.with_moments(latents, x, labels)[0]

    def with_moments(
        self, latents: Tensor, x: Tensor | None = None, labels: LabelMap | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The new latents, and the mean and the biased variance (B, C) of the features where they came along."""
        if self.channels is None:
            if x is not None or labels is not None:
                raise ValueError("x, labels: expected None, since these latents attend to each other")
            return update_by_latents(latents, self.layout, self.layers), None, None
        if x is None or labels is None:
            raise ValueError("x, labels: expected features and their labels, got None")
        return update_by_pixels(
            latents,
            x,
            self.layout,
            labels,
            self.layers,
            encoding=self._encoding(x),
            empty=self.empty,
            choice=self.choice,
        )

    def attention_shares(self, latents: Tensor, x: Tensor, labels: LabelMap) -> Tensor:
        """Which latents each pixel's attention comes from, see :func:`sca_kernels.folding.attention_shares`.

        Args:
            latents, x, labels: as given to the module, which must be one whose latents attend to features.

        Returns:
            (B, H, k, height, width).
        """
        return attention_shares(latents, x, self.layout, labels, self.attention.projections, encoding=self._encoding(x))

    @property
    def layers(self) -> TransformerLayers:
        return TransformerLayers(
            self.attention.projections, self.norm_1, self.mlp, self.norm_2, cache=self.attention.cache
        )

    def _encoding(self, x: Tensor) -> SeparableEncoding | None:
        if self.encoding_channels is None:
            return encoding_of(x, x.shape[1])
        if self.encoding_channels == 0:
            return None
        return encoding_of(x, self.encoding_channels, concatenated=True)


def _layer_norm(norm: nn.LayerNorm, rows: Tensor) -> Tensor:
    weight, bias = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
    return F.layer_norm(rows, norm.normalized_shape, weight, bias, norm.eps)


def _latents_like(rows: Tensor, latents: Tensor, weight: Tensor) -> Tensor:
    """The type that a module without folding would return: under autocast layer norm returns float32."""
    if torch.is_autocast_enabled(rows.device.type):
        return rows
    return rows.to(torch.promote_types(latents.dtype, weight.dtype))
