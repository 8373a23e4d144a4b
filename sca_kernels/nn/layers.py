"""Linear layers and convolutions, with an equalised learning rate and spectral normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import without_autocast
from ..folding import AttentionProjections, FoldingCache, Projection
from ..folding.layers import times

NEGATIVE_SLOPE = 0.2


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
        return project_rows(input, self.projection)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", equalised, lr_mul={self.lr_mul}" if self.equalised else "")


def project_rows(rows: Tensor, projection: Projection) -> Tensor:
    """(..., in) to (..., out), under autocast in its type."""
    if torch.is_autocast_enabled(rows.device.type):
        return F.linear(rows, projection.weight * projection.weight_scale, projection.scaled_bias)
    # Latents may come in float32 from an attention whose weights are in 16 bits.
    dtype = torch.promote_types(rows.dtype, projection.weight.dtype)
    return projection.to(dtype).apply(rows.to(dtype))


def project_pixels(x: Tensor, projection: Projection) -> Tensor:
    """(B, in, height, width) to (B, out, height, width), in the type and memory order of ``x``."""
    projection = projection.to(x.dtype)
    weight = times(projection.weight, projection.weight_scale)
    with without_autocast(x.device):
        return F.conv2d(x, weight[:, :, None, None], projection.scaled_bias)


class Convolution(nn.Conv2d):
    """A convolution, padded to keep the size, optionally with an equalised learning rate or a spectral norm of 1.

    Equalised as in :class:`Linear`: weight * lr_mul / sqrt(in * kernel_size^2), bias * lr_mul. With spectral
    normalisation the weight as a matrix of ``out_channels`` rows is first divided by its largest singular value, as
    estimated by one step of the power iteration in each call while training; bias and scales come after it.

    Args:
        in_channels, out_channels: of the images.
        kernel_size: odd, so that the padding of kernel_size // 2 keeps the size.
        stride: of the kernel.
        bias: whether there is one.
        equalised, lr_mul: see above; ``lr_mul`` is unused unless equalised.
        spectral: whether the weight is normalised.

    Source: Miyato et al., Spectral Normalization for GANs, ICLR 2018; Karras et al., Progressive Growing, ICLR 2018.

    Example:
        >>> layer = Convolution(2, 4, 3, spectral=True)
        >>> layer(torch.randn(1, 2, 5, 6)).shape
        torch.Size([1, 4, 5, 6])
    """

    left_vector: Tensor | None
    right_vector: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool = True,
        equalised: bool = False,
        lr_mul: float = 1.0,
        spectral: bool = False,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        self.equalised, self.lr_mul, self.spectral = equalised, lr_mul, spectral
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        left = F.normalize(torch.randn(out_channels), dim=0) if spectral else None
        right = F.normalize(torch.randn(self.weight[0].numel()), dim=0) if spectral else None
        self.register_buffer("left_vector", left)
        self.register_buffer("right_vector", right)

    def reset_parameters(self) -> None:
        if not self.equalised:
            super().reset_parameters()
            return
        nn.init.normal_(self.weight, std=1 / self.lr_mul)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.effective_parameters()
        return self._conv_forward(input, weight, bias)

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that are convolved with; while training, after one step of the power iteration."""
        weight, bias = self.weight, self.bias
        if self.left_vector is not None and self.right_vector is not None:
            weight = weight / self._largest_singular_value(self.left_vector, self.right_vector)
        if self.equalised:
            weight = weight * (self.lr_mul * self.weight[0].numel() ** -0.5)
            bias = None if bias is None else bias * self.lr_mul
        return weight, bias

    def _largest_singular_value(self, left: Tensor, right: Tensor) -> Tensor:
        matrix = self.weight.flatten(1)
        with without_autocast(matrix.device):
            if self.training:
                with torch.no_grad():
                    right.copy_(F.normalize(matrix.t().mv(left), dim=0, eps=1e-12))
                    left.copy_(F.normalize(matrix.mv(right), dim=0, eps=1e-12))
                # The next call writes to the vectors, and this one's gradient needs them as they are now.
                left, right = left.clone(), right.clone()
            return left.dot(matrix.mv(right))

    def extra_repr(self) -> str:
        equalised = f", equalised, lr_mul={self.lr_mul}" if self.equalised else ""
        return super().extra_repr() + equalised + (", spectral" if self.spectral else "")


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
