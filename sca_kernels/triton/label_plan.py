"""The plan of a label map on a GPU: two sorts, whose cost does not depend on how many labels there are.

There is no kernel of our own here: sorting is what PyTorch's are good at. No step reads anything back, and all shapes
follow from those of the arguments, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def label_plan(
    labels: Tensor, num_labels: int, tile_height: int, tile_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :class:`sca_kernels.labels.LabelPlan`."""
    batch, height, width = labels.shape
    device, pixels = labels.device, height * width
    across = -(-width // tile_width)
    tiles = -(-height // tile_height) * across
    room = min(tile_height * tile_width, num_labels + 1)

    label = labels.reshape(batch, pixels).long()
    # Pixels without a label take the place after the last label.
    label = torch.where((label >= 0) & (label < num_labels), label, num_labels)
    pixel = torch.arange(pixels, device=device)
    tile = (pixel // max(width, 1) // tile_height * across + pixel % max(width, 1) // tile_width).expand(batch, -1)

    sorted_keys, order = torch.sort(label * tiles + tile, dim=1, stable=True)
    borders = torch.arange(num_labels + 1, device=device).mul_(tiles).expand(batch, -1).contiguous()
    offsets = torch.searchsorted(sorted_keys, borders)

    # A segment is a run of equal keys. In the order of tiles, segments of a tile follow one another by label.
    keys, by_tile = torch.sort(tile.gather(1, order), dim=1, stable=True)
    name = label.gather(1, order.gather(1, by_tile))
    starts = torch.ones_like(name, dtype=torch.bool)
    starts[:, 1:] = (keys[:, 1:] != keys[:, :-1]) | (name[:, 1:] != name[:, :-1])
    segment = starts.cumsum(1) - 1
    numbers = torch.arange(tiles + 1, device=device).expand(batch, -1).contiguous()
    ends = torch.searchsorted(keys, numbers)
    # The number of segments before each tile; a last element stands for "before the end".
    before = torch.nn.functional.pad(starts.cumsum(1), (1, 0)).gather(1, ends)
    place = torch.where(starts, keys * room + segment - before.gather(1, keys), tiles * room)
    name = torch.where(name == num_labels, -1, name)
    segments = torch.zeros((batch, tiles * room + 1, 2), dtype=torch.int64, device=device)
    entries = torch.stack((name, by_tile), -1)
    segments.scatter_(1, place.unsqueeze(-1).expand_as(entries), entries)
    # A segment ends where its tile's next one begins in the order of tiles, or with the tile.
    position = torch.arange(pixels, device=device).expand(batch, -1)
    first = torch.zeros((batch, tiles * room + 2), dtype=torch.int64, device=device)
    first.scatter_(1, place, position)
    counts = before.diff(dim=1)
    ordinal = torch.arange(room, device=device)
    first = first[:, : tiles * room].view(batch, tiles, room)
    last = torch.cat((first[:, :, 1:], first.new_zeros((batch, tiles, 1))), 2)
    last = torch.where(ordinal == counts[:, :, None] - 1, ends[:, 1:, None], last)
    found = segments[:, : tiles * room].view(batch, tiles, room, 2)
    return (
        order.to(torch.int32),
        offsets,
        counts.to(torch.int32),
        torch.cat((found, (last - first)[..., None]), 3).to(torch.int32),
    )
