"""The plan of a label map by sorting."""

from __future__ import annotations

import torch
from torch import Tensor


def label_plan(
    labels: Tensor, num_labels: int, tile_height: int, tile_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :class:`sca_kernels.labels.LabelPlan`. Nothing is read back from a GPU."""
    batch, height, width = labels.shape
    device = labels.device
    tiles_across = -(-width // tile_width)
    tiles = -(-height // tile_height) * tiles_across
    room = min(tile_height * tile_width, num_labels + 1)
    places = num_labels + 1  # pixels without a label take the place after the last label

    rows = torch.arange(height, device=device) // tile_height
    columns = torch.arange(width, device=device) // tile_width
    tile = (rows[:, None] * tiles_across + columns).view(1, height * width)
    label = labels.reshape(batch, height * width).long()
    label = torch.where((label >= 0) & (label < num_labels), label, num_labels)

    order = torch.argsort(label * tiles + tile, dim=1, stable=True)
    sorted_labels = label.gather(1, order)
    wanted = torch.arange(num_labels + 1, device=device).expand(batch, -1).contiguous()
    offsets = torch.searchsorted(sorted_labels.contiguous(), wanted)

    counts = torch.zeros(batch, tiles * places, dtype=torch.int64, device=device)
    counts.scatter_add_(1, tile * places + label, torch.ones_like(label))
    counts = counts.view(batch, tiles, places)
    begins = offsets[:, None] + counts.cumsum(1) - counts
    present = counts > 0
    # Segments are listed without gaps; those of absent labels fall into one more place, cut off at the end.
    index = torch.where(present, present.cumsum(2) - 1, room)
    names = torch.arange(places, device=device)
    names[num_labels] = -1
    segments = torch.zeros(batch, tiles, room + 1, 3, dtype=torch.int64, device=device)
    entries = torch.stack((names.expand_as(counts), begins, counts), -1)
    segments.scatter_(2, index.unsqueeze(-1).expand_as(entries), entries)

    return (
        order.to(torch.int32),
        offsets,
        present.sum(2, dtype=torch.int32),
        segments[:, :, :room].to(torch.int32).contiguous(),
    )
