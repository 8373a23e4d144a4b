"""What attention is made of besides attention: linear layers as numbers, and positional encodings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .products import linear


class Projection(NamedTuple):
    """A linear layer, y = (weight_scale * weight) x + bias_scale * bias.

    The scales are those of an equalised learning rate, see :meth:`equalised`. They are kept apart so that the
    parameters are recognised when products of weights are remembered.

    Attributes:
        weight: (out, in).
        bias: (out), or None.
        weight_scale, bias_scale: factors.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> projection = Projection(layer.weight, layer.bias)
        >>> torch.allclose(projection.apply(torch.ones(1, 3)), layer(torch.ones(1, 3)))
        True
    """

    weight: Tensor
    bias: Tensor | None = None
    weight_scale: float = 1.0
    bias_scale: float = 1.0

    @classmethod
    def equalised(cls, weight: Tensor, bias: Tensor | None, lr_mul: float = 1.0) -> Projection:
        """With an equalised learning rate: weight * lr_mul / sqrt(in), bias * lr_mul."""
        return cls(weight, bias, lr_mul * weight.shape[1] ** -0.5, lr_mul)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def scaled_bias(self) -> Tensor | None:
        return None if self.bias is None else times(self.bias, self.bias_scale)

    def to(self, dtype: torch.dtype) -> Projection:
        """The same layer in another type."""
        if self.weight.dtype == dtype and (self.bias is None or self.bias.dtype == dtype):
            return self
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def apply(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(times(rows, self.weight_scale), self.weight, self.scaled_bias)

    def heads(self, count: int) -> list[Projection]:
        """The parts of the output that belong to each head."""
        weights = self.weight.chunk(count)
        biases: Sequence[Tensor | None] = [None] * count if self.bias is None else self.bias.chunk(count)
        return [self._replace(weight=weight, bias=bias) for weight, bias in zip(weights, biases, strict=True)]


class AttentionProjections(NamedTuple):
    """The four linear layers of an attention: from the tokens that attend, to those, and back.

    Attributes:
        query: (d, width of the tokens that attend), heads one after the other in d.
        key: (d, width of the tokens that are attended to).
        value: like key.
        out: (width of the result, d).
        num_heads: divides d. Logits are divided by sqrt(d / num_heads).

    Example:
        >>> query, key, value, out = (Projection(torch.randn(8, 8)) for _ in range(4))
        >>> AttentionProjections(query, key, value, out, num_heads=2).scale
        0.5
    """

    query: Projection
    key: Projection
    value: Projection
    out: Projection
    num_heads: int = 1

    @property
    def layers(self) -> tuple[Projection, Projection, Projection, Projection]:
        return self.query, self.key, self.value, self.out

    @property
    def scale(self) -> float:
        return (self.query.out_features // self.num_heads) ** -0.5

    def to(self, dtype: torch.dtype) -> AttentionProjections:
        """The same layers in another type."""
        query, key, value, out = (layer.to(dtype) for layer in self.layers)
        return AttentionProjections(query, key, value, out, self.num_heads)


class SeparableEncoding(NamedTuple):
    """A positional encoding of an image: pixel (r, c) gets row[r] + col[c].

    Attributes:
        row: (height, E).
        col: (width, E).
        concatenated: whether it follows the C channels of the features, so that projections of pixels take C + E;
            otherwise it is added to them and E = C.

    Example:
        >>> encoding = SeparableEncoding(torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
        >>> encoding.encode(torch.zeros(1, 1, 2, 3)).tolist()
        [[[[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]]]]
    """

    row: Tensor
    col: Tensor
    concatenated: bool = False

    def to(self, dtype: torch.dtype) -> SeparableEncoding:
        """The same encoding in another type."""
        return self._replace(row=self.row.to(dtype), col=self.col.to(dtype))

    def encode(self, x: Tensor) -> Tensor:
        """The features (B, C, height, width) with their encoding, (B, C or C + E, height, width)."""
        # Adjacent pixels in both terms: adding across the memory order takes ten times as long.
        row, col = self.row.t().contiguous(), self.col.t().contiguous()
        encoding = row.unsqueeze(2) + col.unsqueeze(1)
        if self.concatenated:
            return torch.cat([x, encoding.expand(len(x), -1, -1, -1)], 1)
        return x + encoding

    def join(self, features: Tensor, encoding: Tensor) -> Tensor:
        """Rows of features (..., C) with the encoding (..., E) that belongs to each."""
        return torch.cat([features, encoding], -1) if self.concatenated else features + encoding


def times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor
