"""Gamma and beta from the label map alone, by a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..labels import LabelMap, LatentLayout
from .layers import Convolution


class MapEncoder(nn.Module):
    """Gamma and beta for each pixel from the labels around it.

        h = relu(shared(planes)),    gamma = gamma(h),    beta = beta(h)

    with three convolutions. There is a plane for each latent, which is 1 at the pixels of its label and 0 elsewhere.
    No plane is made: what the first convolution does to a pixel is looked up, one row of numbers for the label of
    each neighbour, in a table that adds up the weights of a label's latents.

    Args:
        layout: how many latents each label has.
        channels: C, of gamma and beta.
        hidden_channels: of h.
        kernel_size: of the convolutions, odd.
        equalised, lr_mul: see :class:`Convolution`.

    Source: Park et al., SPADE, CVPR 2019, as SCAM's published code uses it.

    Example:
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> gamma, beta = MapEncoder(LatentLayout((4, 1)), channels=8)(labels)
        >>> gamma.shape, beta.shape
        (torch.Size([1, 8, 2, 2]), torch.Size([1, 8, 2, 2]))
    """

    def __init__(
        self,
        layout: LatentLayout,
        channels: int,
        hidden_channels: int = 128,
        kernel_size: int = 3,
        *,
        equalised: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {"equalised": equalised, "lr_mul": lr_mul}
        self.layout = layout
        self.shared = Convolution(layout.count, hidden_channels, kernel_size, **settings)
        self.gamma = Convolution(hidden_channels, channels, kernel_size, **settings)
        self.beta = Convolution(hidden_channels, channels, kernel_size, **settings)

    def forward(
        self, labels: LabelMap, *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> tuple[Tensor, Tensor]:
        """A label map to gamma and beta (B, C, height, width), in the given memory order."""
        if labels.num_labels != self.layout.num_labels:
            raise ValueError(f"labels: expected {self.layout.num_labels} labels, got {labels.num_labels}")
        return encode_map(
            labels, self.layout, *self.shared.effective_parameters(), self.gamma, self.beta, memory_format=memory_format
        )


def encode_map(
    labels: LabelMap,
    layout: LatentLayout,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Callable[[Tensor], Tensor],
    beta: Callable[[Tensor], Tensor],
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor]:
    """Gamma and beta (B, C, height, width), from the first convolution's parameters and the two others."""
    hidden = F.relu(_convolve_labels(labels, layout, weight, bias)).contiguous(memory_format=memory_format)
    return gamma(hidden), beta(hidden)


def _convolve_labels(labels: LabelMap, layout: LatentLayout, weight: Tensor, bias: Tensor | None) -> Tensor:
    hidden_channels, _, size, _ = weight.shape
    count, taps = labels.num_labels, size * size
    of_labels = weight.new_zeros(hidden_channels, count, size, size)
    of_labels = of_labels.index_add(1, layout.labels(weight.device), weight)
    # One label more, all zeros: that of the pixels without one, and of those beyond the border.
    table = F.pad(of_labels.permute(1, 2, 3, 0).flatten(1), (0, 0, 0, 1)).view(-1, hidden_channels)

    known = (labels.labels >= 0) & (labels.labels < count)
    labels_around = F.pad(torch.where(known, labels.labels, count), (size // 2,) * 4, value=count)
    rows = (labels_around * taps).unfold(1, size, 1).unfold(2, size, 1).flatten(0, 2).flatten(1)
    rows = rows + torch.arange(taps, dtype=rows.dtype, device=rows.device)
    sums = F.embedding_bag(rows, table, mode="sum")
    if bias is not None:
        sums = sums + bias
    return sums.view(labels.batch, labels.height, labels.width, hidden_channels).permute(0, 3, 1, 2)
