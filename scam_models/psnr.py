"""The peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """How close images from -1 to 1 are to others, in dB: 10 log10(2^2 / mean squared error) of each.

    Args:
        images, targets: (B, channels, height, width).

    Returns:
        (B,) float64; 100 for images that are the same.

    Example:
        >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)).round(decimals=2).item()
        12.04
    """
    error = (images.double() - targets.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))
