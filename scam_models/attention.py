"""How much each pixel and the latents of its label attend to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sca_kernels import LabelMap, LatentLayout


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
    """How much each pixel attends to each latent of its label, or gets from it, where latents attend to pixels.

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

    @classmethod
    def from_heads(cls, weights: Tensor, layout: LatentLayout, labels: LabelMap) -> LatentAttention:
        """The mean over heads.

        Args:
            weights: (B, H, k, height, width), see :func:`sca_kernels.folding.attention_weights`.
            layout: of the latents.
            labels: of any resolution, for B images or one for all.
        """
        label = labels.at(*weights.shape[3:]).labels.long().expand(len(weights), -1, -1)
        return cls(layout.offsets(label.device)[label.clamp(0, layout.num_labels - 1)], weights.mean(1))

    def at(self, height: int, width: int) -> LatentAttention:
        """The same at another resolution, by the rule of ``interpolate(mode="nearest")``, like :meth:`LabelMap.at`.

        Example:
            >>> attention = LatentAttention(torch.tensor([[[3, 0]]]), torch.tensor([[[[0.2, 1.0]], [[0.8, 0.0]]]]))
            >>> attention.at(2, 4).strongest().latent.tolist()
            [[[4, 4, 0, 0], [4, 4, 0, 0]]]
        """
        if (height, width) == self.first.shape[1:]:
            return self
        # Numbers of latents are exact in float64, which interpolation takes.
        first = F.interpolate(self.first.unsqueeze(1).double(), (height, width)).squeeze(1).long()
        return LatentAttention(first, F.interpolate(self.weights, (height, width)))

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
