"""How close a part of an image is to another, what its colours are like, and how well two divisions of it agree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_PIXELS = 16  # of a region whose colours are compared


def psnr_within(images: Tensor, targets: Tensor, where: Tensor) -> Tensor:
    """The peak signal-to-noise ratio over a part of each image.

    Args:
        images, targets: (B, 3, height, width), from -1 to 1.
        where: (B, height, width), true for the pixels that count.

    Returns:
        (B,) in dB, NaN where no pixel counts.

    Example:
        >>> where = torch.tensor([[[True, False]]])
        >>> psnr_within(torch.zeros(1, 3, 1, 2), torch.tensor([0.5, 9.0]).expand(1, 3, 1, 2), where)
        tensor([12.0412], dtype=torch.float64)
    """
    error = (images.double() - targets.double()).square().mean(1)
    mean = error.where(where, 0).sum((1, 2)) / where.sum((1, 2))
    return 10 * torch.log10(4 / mean.clamp(min=4e-10))


def colour_statistics(images: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the colours of each region, from 0 to 255.

    Args:
        images: (B, 3, height, width), from -1 to 1.
        labels: (B, height, width).
        num_labels: number of labels.

    Returns:
        two of (B, num_labels, 3), NaN for labels with fewer than LEAST_PIXELS pixels.

    Example:
        >>> images = torch.tensor([-1.0, 1.0]).expand(1, 3, 16, 2)
        >>> mean, deviation = colour_statistics(images, torch.zeros(1, 16, 2), num_labels=2)
        >>> mean[0, 0, 0].item(), deviation[0, 0, 0].item(), mean[0, 1, 0].item()
        (127.5, 127.5, nan)
    """
    colours = ((images.double() + 1) * 127.5).unsqueeze(1)
    is_own = labels.unsqueeze(1) == torch.arange(num_labels)[:, None, None]
    count = is_own.sum((2, 3)).double().unsqueeze(-1)
    count = count.where(count >= LEAST_PIXELS, math.nan)
    is_own = is_own.unsqueeze(2)
    mean = colours.where(is_own, 0).sum((3, 4)) / count
    variance = (colours - mean[..., None, None]).square().where(is_own, 0).sum((3, 4)) / count
    return mean, variance.sqrt()


def purity(parts: Tensor, truth: Tensor) -> float:
    """The share of pixels that are where they belong if each part is taken for what most of it is.

    Args:
        parts, truth: (N,) integers.

    Example:
        >>> purity(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 3, 2]))
        0.75
    """
    return float(_counts(parts, truth).amax(1).sum()) / len(parts)


def normalised_mutual_information(parts: Tensor, truth: Tensor) -> float:
    """How much two divisions of the same pixels say of each other: 2 I(parts; truth) / (H(parts) + H(truth)).

    Args:
        parts, truth: (N,) integers.

    Returns:
        from 0, nothing, to 1, the same division; 0 if neither divides.

    Example:
        >>> normalised_mutual_information(torch.tensor([5, 5, 7, 7]), torch.tensor([1, 1, 2, 2]))
        1.0
    """
    joint = _counts(parts, truth).double() / len(parts)
    of_parts, of_truth, of_both = (_entropy(share) for share in (joint.sum(1), joint.sum(0), joint.flatten()))
    return 2 * (of_parts + of_truth - of_both) / (of_parts + of_truth) if of_parts + of_truth > 0 else 0.0


def _counts(parts: Tensor, truth: Tensor) -> Tensor:
    """How many pixels each pair of a part and a true one has."""
    (values, row), (others, column) = (numbers.unique(return_inverse=True) for numbers in (parts, truth))
    pairs = torch.bincount(row * len(others) + column, minlength=len(values) * len(others))
    return pairs.view(len(values), len(others))


def _entropy(shares: Tensor) -> float:
    return float(-torch.special.xlogy(shares, shares).sum())
