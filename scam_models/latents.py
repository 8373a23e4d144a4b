"""Latents as the encoder makes them: rows of numbers, or a distribution over them; and how sets of them are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sca_kernels import LatentLayout


class LatentDistribution(NamedTuple):
    """Independent normal distributions.

    Attributes:
        mean: (B, m, D).
        log_variance: the logarithm of the variance, (B, m, D).

    Example:
        >>> distribution = LatentDistribution(torch.ones(1, 5, 6), torch.full((1, 5, 6), -torch.inf))
        >>> bool((distribution.sample() == 1).all())
        True
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """mean + exp(log_variance / 2) * standard normal numbers, (B, m, D)."""
        deviation = (0.5 * self.log_variance).exp()
        return torch.randn_like(deviation) * deviation + self.mean


Latents = Tensor | LatentDistribution


class DistributionLayer(nn.Module):
    """Means and variances of latents, by a linear layer for each latent.

        (mean_i, log_variance_i) = weight_i z_i + bias_i

    Args:
        count: number of latents m.
        latent_dim: D.

    Example:
        >>> DistributionLayer(5, 6)(torch.randn(2, 5, 6)).log_variance.shape
        torch.Size([2, 5, 6])
    """

    def __init__(self, count: int, latent_dim: int) -> None:
        super().__init__()
        bound = latent_dim**-0.5  # as each layer for itself would start
        self.weight = nn.Parameter(torch.empty(count, 2 * latent_dim, latent_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 2 * latent_dim).uniform_(-bound, bound))

    def forward(self, latents: Tensor) -> LatentDistribution:
        """(B, m, D) to two of (B, m, D)."""
        latents = latents.to(self.weight.dtype).transpose(0, 1)
        mapped = torch.baddbmm(self.bias.unsqueeze(1), latents, self.weight.transpose(1, 2))
        return LatentDistribution(*mapped.transpose(0, 1).chunk(2, -1))


def take_latents(layout: LatentLayout, base: Latents, others: Mapping[int, Latents]) -> Latents:
    """The latents of ``base``, except those of the labels that ``others`` names, which come from there.

    Args:
        layout: how many latents each label has.
        base: (B, m, D), or a distribution of that shape.
        others: for each label that is not taken from ``base`` where it is taken from instead, shaped like ``base``.

    Returns:
        like ``base``.

    Gradients: of base and others.

    Raises:
        TypeError: if latents and distributions are mixed.
        ValueError: if a label is out of range, or a shape does not agree with the layout or with ``base``.

    Example:
        >>> zeros, ones = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
        >>> take_latents(LatentLayout((1, 2, 1)), zeros, {1: ones})[0, :, 0].tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    for label, other in others.items():
        if isinstance(other, LatentDistribution) != isinstance(base, LatentDistribution):
            raise TypeError(f"others[{label}]: expected a {type(base).__name__} like base, got {type(other).__name__}")
    if not isinstance(base, LatentDistribution):
        return _take(layout, base, others)
    parts = enumerate(base)
    return LatentDistribution(
        *(_take(layout, part, {label: other[index] for label, other in others.items()}) for index, part in parts)
    )


def between(begin: Latents, end: Latents, share: float) -> Latents:
    """Latents on the straight line from ``begin`` to ``end``; of distributions, mean and logarithm of the variance.

    Args:
        begin, end: two tensors or two distributions of one shape.
        share: of the way, 0 for ``begin`` and 1 for ``end``.

    Example:
        >>> between(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), 0.25)
        tensor([[[0.2500, 0.2500]]])
    """
    if isinstance(begin, LatentDistribution) and isinstance(end, LatentDistribution):
        return LatentDistribution(*(torch.lerp(one, other, share) for one, other in zip(begin, end, strict=True)))
    assert isinstance(begin, Tensor) and isinstance(end, Tensor)
    return torch.lerp(begin, end, share)


def _take(layout: LatentLayout, base: Tensor, others: Mapping[int, Any]) -> Tensor:
    if base.dim() != 3 or base.shape[1] != layout.count:
        raise ValueError(f"base: expected shape (B, {layout.count}, D) to fit the layout, got {tuple(base.shape)}")
    for label, other in others.items():
        if not 0 <= label < layout.num_labels:
            raise ValueError(f"others: expected labels from 0 to {layout.num_labels - 1}, got {label}")
        if other.shape != base.shape:
            raise ValueError(f"others[{label}]: expected shape {tuple(base.shape)} like base, got {tuple(other.shape)}")
    spans = pairwise(layout.cu_latents)
    return torch.cat([others.get(label, base)[:, begin:end] for label, (begin, end) in enumerate(spans)], 1)


def check_latents(name: str, latents: Any, batch: int, shape: tuple[int, int]) -> None:
    if not isinstance(latents, Tensor):
        raise TypeError(f"{name}: expected a tensor or a LatentDistribution, got {type(latents).__name__}")
    if latents.dim() != 3 or latents.shape[1:] != shape or batch not in (1, latents.shape[0]):
        count, width = shape
        images = "B" if batch == 1 else batch
        raise ValueError(f"{name}: expected shape ({images}, {count}, {width}), got {tuple(latents.shape)}")
