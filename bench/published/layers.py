"""Layers with an equalised learning rate, and positional embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEGATIVE_SLOPE = 0.2
WAVELENGTH = 10000


class EqualLinear(nn.Module):
    """A linear layer whose weight is multiplied by lr_mul / sqrt(in_dim), and its bias by lr_mul, in every call.

    Without a bias it can be made but not called, as published.
    """

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, bias_init: float = 0, lr_mul: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init))) if bias else None
        self.scale = lr_mul / in_dim**0.5
        self.lr_mul = lr_mul

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.scale, self.bias * self.lr_mul)


class EqualConv2d(nn.Module):
    """A convolution whose weight is multiplied by lr_mul / sqrt(in_channels * kernel_size²), and its bias by lr_mul.

    Without a bias it can be made but not called, as published.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = lr_mul / (in_channels * kernel_size**2) ** 0.5
        self.stride, self.padding, self.lr_mul = stride, padding, lr_mul

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight * self.scale, self.bias * self.lr_mul
        return F.conv2d(input, weight, bias, self.stride, self.padding)


def linear_layer(use_equalized_lr: bool, lr_mul: float) -> Callable[..., nn.Module]:
    """What makes a linear layer; ``lr_mul`` has no meaning unless the learning rate is equalised."""
    return partial(EqualLinear, lr_mul=lr_mul) if use_equalized_lr else nn.Linear


def convolution_layer(use_equalized_lr: bool, lr_mul: float) -> Callable[..., nn.Module]:
    """What makes a convolution, likewise."""
    return partial(EqualConv2d, lr_mul=lr_mul) if use_equalized_lr else nn.Conv2d


def two_layers(width: int, make_linear: Callable[..., nn.Module]) -> list[nn.Module]:
    """The small network for latents."""
    return [make_linear(width, width), nn.LeakyReLU(NEGATIVE_SLOPE), make_linear(width, width)]


class SinusoidalPositionalEmbedding(nn.Module):
    """Adds or concatenates sines and cosines of a pixel's place, ``dim`` channels, which four divides.

    A quarter of the channels each: sine of the column, sine of the row, cosine of the column, cosine of the row, of
    coordinates from -1 to 1 at frequencies 10000^(-2i / (dim / 2)). As published they are computed anew, for every
    pixel, in every call. Only here they are exact to the type of the model: the frequencies of the published code are
    those of its float32 buffer in float64 too.
    """

    def __init__(self, dim: int, emb_type: Literal["add", "concat"] = "add") -> None:
        super().__init__()
        if emb_type not in ("add", "concat"):
            raise ValueError(f"emb_type: expected 'add' or 'concat', got {emb_type!r}")
        self.half = dim // 2
        self.emb_type = emb_type
        self.register_buffer("inv_freq", self._frequencies(torch.float32, None))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width), where C is ``dim`` if it is added, to (B, C or C + dim, height, width)."""
        exact = torch.promote_types(self.inv_freq.dtype, torch.float32)
        frequencies = self._frequencies(exact, x.device).to(self.inv_freq.dtype)
        height, width = x.shape[-2:]
        rows, columns = (
            torch.linspace(-1, 1, size, dtype=exact, device=x.device).to(frequencies.dtype) * frequencies[:, None]
            for size in (height, width)
        )
        angles = torch.cat([columns.unsqueeze(1).expand(-1, height, -1), rows.unsqueeze(2).expand(-1, -1, width)])
        embedding = torch.cat([angles.sin(), angles.cos()])
        if self.emb_type == "add":
            return x + embedding
        return torch.cat([x, embedding.expand(len(x), -1, -1, -1)], 1)

    def _frequencies(self, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        exponents = torch.arange(0, self.half, 2, dtype=dtype, device=device) / self.half
        return 1 / WAVELENGTH**exponents


class LearnedPositionalEmbedding(nn.Module):
    """Adds a learned table to tokens, which may be fewer than its rows."""

    def __init__(self, num_tokens_max: int, dim_tokens: int) -> None:
        super().__init__()
        self.num_tokens_max, self.dim_tokens = num_tokens_max, dim_tokens
        self.weights = nn.Parameter(torch.randn(num_tokens_max, dim_tokens))

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, dim_tokens) to the same shape."""
        return x + self.weights[: x.shape[1]]


class BaseNetwork(nn.Module):
    """A whole network, with the published initialisation, which the published configurations do not ask for."""

    def init_weight(self, do_init: bool = True) -> None:
        """Draws every weight of a linear layer or convolution anew, Xavier-normal with gain 0.02."""
        if do_init:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d, EqualLinear, EqualConv2d)):
                    nn.init.xavier_normal_(module.weight.data, gain=0.02)
