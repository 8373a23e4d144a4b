"""How much each pixel attends to the latents of its label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StrongestLatents(NamedTuple):
    """Which latent each pixel attends to most.

    Attributes:
        latent: (B, height, width) int64, its number, -1 for a pixel whose label has none.
        weight: (B, height, width), how much it attends to it, from 0 to 1.

    Example:
        >>> strongest = StrongestLatents(torch.tensor([[[3, -1]]]), torch.tensor([[[0.5, 0.0]]]))
        >>> int(strongest.latent.max())
        3
    """

    latent: Tensor
    weight: Tensor


class LatentAttention(NamedTuple):
    """How much each pixel attends to each latent of its label.

    Attributes:
        first: (B, height, width) int64, the number of the first latent of each pixel's label.
        weights: (B, k, height, width), from 0 to 1: how much it attends to that one, the next one, and so on, for the k
            latents of the label that has most; 0 for those that its label does not have.

    Example:
        >>> attention = LatentAttention(torch.tensor([[[3, 0]]]), torch.tensor([[[[0.2, 1.0]], [[0.8, 0.0]]]]))
        >>> attention.strongest().latent.tolist()
        [[[4, 0]]]
        >>> attention.of_latent(4)
        tensor([[[0.8000, 0.0000]]])
    """

    first: Tensor
    weights: Tensor

    def strongest(self) -> StrongestLatents:
        """The latent with the largest weight."""
        weight, place = self.weights.max(1)
        return StrongestLatents(torch.where(weight > 0, self.first + place, -1), weight)

    def of_latent(self, latent: int) -> Tensor:
        """How much each pixel attends to one latent: (B, height, width), 0 where the label is another."""
        place = (latent - self.first).unsqueeze(1)
        is_near = (place >= 0) & (place < self.weights.shape[1])
        weight = self.weights.gather(1, place.clamp(0, self.weights.shape[1] - 1))
        return torch.where(is_near, weight, 0).squeeze(1)
