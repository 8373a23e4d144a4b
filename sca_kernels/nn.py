"""The layers of SCAM as modules, on folded kernels.

The parameters are those of the published layers, one to one, under names that say what they are. What a module computes
does not depend on how: projections are folded onto the latents wherever that is faster, see :mod:`sca_kernels.folding`.
In evaluation mode products of weights alone are remembered; modules can be compiled, copied and pickled.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .folding import (
    AttentionProjections,
    Choice,
    FoldingCache,
    Projection,
    SeparableEncoding,
    latents_attend_to_latents,
    latents_attend_to_pixels,
    modulate_by_latents,
    pixels_attend_to_latents,
)
from .folding.calls import Empty
from .labels import LabelMap, LatentLayout
from .ops.instance_modulate import instance_modulate
from .tracing import is_tracing

NEGATIVE_SLOPE = 0.2


def sinusoidal_encoding(
    height: int,
    width: int,
    channels: int,
    *,
    concatenated: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SeparableEncoding:
    """The sinusoidal encoding of a pixel's place, as one table over rows and one over columns.

    With frequencies f_i = 10000^(-2 i / (channels / 2)), i < channels / 4, and coordinates r, c from -1 to 1, the
    channels are, a quarter each: sin(c f_i), sin(r f_i), cos(c f_i), cos(r f_i).

    The tables are remembered for each size, type and device, except while compiling or exporting.

    Args:
        height, width: of the image.
        channels: of the encoding, divisible by four.
        concatenated: whether it is concatenated to the features or added to them.
        dtype, device: of the tables.

    Raises:
        ValueError: if ``channels`` is not divisible by four.

    Source: the positional embedding of the published SCAM code.

    Example:
        >>> encoding = sinusoidal_encoding(2, 3, 8)
        >>> encoding.row.shape, encoding.col.shape
        (torch.Size([2, 8]), torch.Size([3, 8]))
        >>> encoding.encode(torch.zeros(1, 8, 2, 3)).shape
        torch.Size([1, 8, 2, 3])
    """
    if channels < 1 or channels % 4:
        raise ValueError(f"channels: expected a positive number divisible by four, got {channels}")
    device = torch.get_default_device() if device is None else torch.device(device)
    if is_tracing():
        return SeparableEncoding(*_make_tables(height, width, channels, dtype, device), concatenated)
    key = (height, width, channels, dtype, device)
    tables = _tables.get(key)
    if tables is None:
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        with torch.inference_mode(False):  # what is remembered may serve training later
            tables = _tables[key] = _make_tables(height, width, channels, dtype, device)
    return SeparableEncoding(*tables, concatenated)


_MOST_TABLES = 256
_tables: dict[tuple[int, int, int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


def _make_tables(
    height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels // 2)
    frequencies = 10000 ** (-2 * exponents)

    def waves(size: int) -> tuple[Tensor, Tensor]:
        angles = torch.linspace(-1, 1, size, dtype=torch.float64, device=device).unsqueeze(1) * frequencies
        return angles.sin(), angles.cos()

    (row_sin, row_cos), (col_sin, col_cos) = waves(height), waves(width)
    row_none, col_none = torch.zeros_like(row_sin), torch.zeros_like(col_sin)
    row = torch.cat([row_none, row_sin, row_none, row_cos], 1)
    col = torch.cat([col_sin, col_none, col_cos, col_none], 1)
    return row.to(dtype), col.to(dtype)


class Linear(nn.Linear):
    """A linear layer, optionally with an equalised learning rate: weight * lr_mul / sqrt(in), bias * lr_mul.

    Equalised parameters start from a normal distribution of deviation 1 / lr_mul, biases from zero.

    Args:
        in_features, out_features: widths.
        bias: whether there is one.
        equalised: whether the learning rate is.
        lr_mul: see above; unused unless equalised.

    Example:
        >>> layer = Linear(4, 2, equalised=True, lr_mul=0.5)
        >>> x = torch.ones(1, 4)
        >>> torch.allclose(layer(x), x @ layer.weight.t() * 0.25)
        True
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, equalised: bool = False, lr_mul: float = 1.0
    ) -> None:
        self.equalised, self.lr_mul = equalised, lr_mul
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        if not self.equalised:
            super().reset_parameters()
            return
        nn.init.normal_(self.weight, std=1 / self.lr_mul)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def projection(self) -> Projection:
        if self.equalised:
            return Projection.equalised(self.weight, self.bias, self.lr_mul)
        return Projection(self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        projection = self.projection
        if torch.is_autocast_enabled(input.device.type):
            return F.linear(input, projection.weight * projection.weight_scale, projection.scaled_bias)
        # Latents may come in float32 from an attention whose weights are in 16 bits.
        dtype = torch.promote_types(input.dtype, projection.weight.dtype)
        return projection.to(dtype).apply(input.to(dtype))

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", equalised, lr_mul={self.lr_mul}" if self.equalised else "")


class AttentionLayers(nn.Module):
    """The four linear layers of an attention, see :class:`sca_kernels.folding.AttentionProjections`.

    Args:
        to_dim: width of the tokens that attend, and of the result unless ``out_dim`` is given.
        from_dim: width of the tokens that are attended to.
        attention_dim: width of queries, keys and values, all heads together.
        num_heads: divides ``attention_dim``.
        out_dim: width of the result.
        equalised, lr_mul: see :class:`Linear`.

    Example:
        >>> AttentionLayers(to_dim=6, from_dim=3, attention_dim=8).projections.out.weight.shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        to_dim: int,
        from_dim: int,
        attention_dim: int,
        num_heads: int = 1,
        *,
        out_dim: int | None = None,
        equalised: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or attention_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of attention_dim={attention_dim}, got {num_heads}")
        settings: dict[str, Any] = {"equalised": equalised, "lr_mul": lr_mul}
        self.num_heads = num_heads
        self.query = Linear(to_dim, attention_dim, **settings)
        self.key = Linear(from_dim, attention_dim, **settings)
        self.value = Linear(from_dim, attention_dim, **settings)
        self.out = Linear(attention_dim, to_dim if out_dim is None else out_dim, **settings)
        self._cache = FoldingCache()

    @property
    def projections(self) -> AttentionProjections:
        return AttentionProjections(
            self.query.projection, self.key.projection, self.value.projection, self.out.projection, self.num_heads
        )

    @property
    def cache(self) -> FoldingCache | None:
        """Where products of weights are remembered; None while training."""
        return None if self.training else self._cache


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
            encoding=_encoding_of(x, x.shape[1]) if self.encoded else None,
            empty=self.empty,
            choice=self.choice,
            cache=self.attention.cache,
        )


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
        mean = variance = None
        if self.channels is None:
            if x is not None or labels is not None:
                raise ValueError("x, labels: expected None, since these latents attend to each other")
            attended = latents_attend_to_latents(latents, self.layout, self.attention.projections)
        else:
            if x is None or labels is None:
                raise ValueError("x, labels: expected features and their labels, got None")
            attended, mean, variance = latents_attend_to_pixels(
                latents,
                x,
                self.layout,
                labels,
                self.attention.projections,
                encoding=self._encoding(x),
                empty=self.empty,
                choice=self.choice,
                cache=self.attention.cache,
            )
        rows = _layer_norm(self.norm_1, attended + latents)
        rows = _layer_norm(self.norm_2, self.mlp(rows) + rows)
        return _latents_like(rows, latents, self.norm_2.weight), mean, variance

    def _encoding(self, x: Tensor) -> SeparableEncoding | None:
        if self.encoding_channels is None:
            return _encoding_of(x, x.shape[1])
        if self.encoding_channels == 0:
            return None
        return _encoding_of(x, self.encoding_channels, concatenated=True)


class SemanticModulation(nn.Module):
    """The modulation of SCAM's generator: latents and features exchange what they know, label by label.

    The latents are updated, duplex: by a :class:`SemanticAttentionTransformer` that attends to the features, simplex:
    by two linear layers with a leaky ReLU in between. Then the pixels attend to them, as in
    :class:`SemanticCrossAttention`, with a_p what pixel p gets:

        out_p = leaky_relu((1 + gamma(a_p)) * normalise(x)_p + beta(a_p) + noise_strength * noise_p)

    The noise is one standard normal number for each pixel, in evaluation mode too, shared by the channels; its strength
    is learned for each channel. The encoding is added for the attentions only. In duplex one pass over the features
    serves the latents' attention and the statistics of the normalisation.

    Where gamma and beta are blended with those of another network, pixel by pixel (``use_mask_adain`` of the published
    code), :class:`SemanticCrossAttention`, two layers and :func:`sca_kernels.instance_modulate` take its place.

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
        normalisation: Literal["instance", "layer", "batch"] = "instance",
        noise: bool = True,
        modulate: bool = True,
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
        mean = variance = None
        if isinstance(self.latent_update, SemanticAttentionTransformer):
            latents, mean, variance = self.latent_update.with_moments(latents, x, labels)
        else:
            latents = self.latent_update(latents)
        table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        settings: dict[str, Any] = {
            "stats": self._statistics(x, mean, variance, table_dtype),
            "eps": self.eps,
            "negative_slope": NEGATIVE_SLOPE,
        }
        if self.noise_strength is not None:
            settings["noise"] = _draw_noise(x, table_dtype) if noise is None else noise
            settings["noise_strength"] = self.noise_strength.to(table_dtype) * self.lr_mul
        if not self.modulate:
            return instance_modulate(x, **settings), latents
        out = modulate_by_latents(
            x,
            latents,
            self.layout,
            labels,
            self.attention.projections,
            self.gamma.projection,
            self.beta.projection,
            encoding=_encoding_of(x, x.shape[1]),
            empty=self.empty,
            choice=self.choice,
            cache=self.attention.cache,
            **settings,
        )
        return out, latents

    def _statistics(
        self, x: Tensor, mean: Tensor | None, variance: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Mean and 1 / standard deviation, each broadcastable to (B, C); None leaves them to the kernel."""
        norm = self.batch_norm
        if norm is not None and not norm.training:
            assert norm.running_mean is not None and norm.running_var is not None
            return norm.running_mean.to(dtype), (norm.running_var.to(dtype) + norm.eps).rsqrt()
        if mean is None or variance is None:
            if self.normalisation == "instance":
                return None
            variance, mean = torch.var_mean(x.to(dtype), (2, 3), correction=0)
        if self.normalisation != "instance":
            over = (0,) if norm is not None else (1,)
            total = mean.mean(over, keepdim=True)
            variance = (variance + (mean - total).square()).mean(over, keepdim=True)
            mean = total
        if norm is not None:
            _update_running(norm, mean.squeeze(0), variance.squeeze(0), x.numel() // x.shape[1])
        return mean, (variance + self.eps).rsqrt()


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


def _encoding_of(x: Tensor, channels: int, *, concatenated: bool = False) -> SeparableEncoding:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return sinusoidal_encoding(
        x.shape[2], x.shape[3], channels, concatenated=concatenated, dtype=dtype, device=x.device
    )


def _layer_norm(norm: nn.LayerNorm, rows: Tensor) -> Tensor:
    weight, bias = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
    return F.layer_norm(rows, norm.normalized_shape, weight, bias, norm.eps)


def _latents_like(rows: Tensor, latents: Tensor, weight: Tensor) -> Tensor:
    """The type that a module without folding would return: under autocast layer norm returns float32."""
    if torch.is_autocast_enabled(rows.device.type):
        return rows
    return rows.to(torch.promote_types(latents.dtype, weight.dtype))
