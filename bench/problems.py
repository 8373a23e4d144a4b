"""Inputs of an attention with the labels of their tokens, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sca_kernels import LabelMap, LatentLayout

from .dense import attention_by_label

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One attention to compute.

    Attributes:
        query, key, value: (1, H, N, D), with the strides that splitting the heads of a (1, N, H * D)
            tensor leaves.
        grad_out: the gradient that backward starts from.
        query_labels, key_labels: (1, N), the label of each token.
        query_tokens, key_tokens: the same for this library.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    query_labels: Tensor
    key_labels: Tensor
    query_tokens: LabelMap | LatentLayout
    key_tokens: LabelMap | LatentLayout

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def num_labels(self) -> int:
        return self.query_tokens.num_labels

    @property
    def latents(self) -> int:
        """Latents of each label."""
        sides = (self.query_tokens, self.key_tokens)
        return next(side.max_per_label for side in sides if isinstance(side, LatentLayout))

    @property
    def shape(self) -> dict[str, int]:
        """What a result is recorded with."""
        return {
            "queries": self.query.shape[2],
            "keys": self.key.shape[2],
            "heads": self.query.shape[1],
            "width": self.query.shape[3],
            "latents_per_label": self.latents,
            "labels": self.num_labels,
            "labels_present": int(torch.unique(self.query_labels).numel()),
        }

    def task(self, attend: Attention, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        """A function that computes the output, with ``backward`` also the three gradients."""
        query, key, value = self.query, self.key, self.value
        if not backward:
            return lambda: (attend(query, key, value),)
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = attend(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, self.grad_out)

        return forward_and_backward

    def expected(self, backward: bool = True) -> tuple[Tensor, ...]:
        """The output in float64, with ``backward`` also the three gradients."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention_by_label(query, key, value, self.query_labels, self.key_labels)

        tensors = (self.query, self.key, self.value, self.grad_out)
        query, key, value, grad_out = (tensor.double() for tensor in tensors)
        exact = replace(self, query=query, key=key, value=value, grad_out=grad_out)
        return exact.task(attend, backward)()


@dataclass(frozen=True)
class Sizes:
    """Latents per label, heads, width of a head, and type."""

    latents: int = 8
    heads: int = 1
    width: int = 256
    dtype: torch.dtype = torch.float32


def pixels_to_latents(labels: Tensor, num_labels: int, sizes: Sizes) -> Problem:
    """Every pixel attends to the latents of its label."""
    layout = LatentLayout.uniform(num_labels, sizes.latents)
    return _problem(LabelMap(labels, num_labels), layout, sizes)


def latents_to_pixels(labels: Tensor, num_labels: int, sizes: Sizes) -> Problem:
    """Every latent attends to the pixels of its label."""
    layout = LatentLayout.uniform(num_labels, sizes.latents)
    return _problem(layout, LabelMap(labels, num_labels), sizes)


def latents_to_latents(num_labels: int, sizes: Sizes) -> Problem:
    """Every latent attends to the latents of its label."""
    layout = LatentLayout.uniform(num_labels, sizes.latents)
    return _problem(layout, layout, sizes)


def _problem(query_tokens: LabelMap | LatentLayout, key_tokens: LabelMap | LatentLayout, sizes: Sizes) -> Problem:
    generator = torch.Generator().manual_seed(0)
    query_labels, key_labels = _labels(query_tokens), _labels(key_tokens)

    def tokens(labels: Tensor) -> Tensor:
        shape = (1, labels.shape[1], sizes.heads * sizes.width)
        together = torch.randn(shape, generator=generator).to(sizes.dtype)
        return together.view(*shape[:2], sizes.heads, sizes.width).transpose(1, 2)

    return Problem(
        query=tokens(query_labels),
        key=tokens(key_labels),
        value=tokens(key_labels),
        grad_out=tokens(query_labels),
        query_labels=query_labels,
        key_labels=key_labels,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
    )


def _labels(tokens: LabelMap | LatentLayout) -> Tensor:
    if isinstance(tokens, LabelMap):
        return tokens.labels.flatten(1)
    return tokens.labels(torch.device("cpu"))[None]
