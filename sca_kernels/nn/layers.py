"""Linear layers and convolutions, with an equalised learning rate and spectral normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..folding import AttentionProjections, FoldingCache, Projection

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
