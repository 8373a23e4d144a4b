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
    begun = starts.cumsum(1)
    # Where each tile begins and how many segments do before; then where its segments begin and where the last one ends.
    tile_numbers = torch.arange(tiles + 1, device=device).expand(batch, -1).contiguous()
    tile_begins = torch.searchsorted(keys, tile_numbers)
    before = torch.nn.functional.pad(begun, (1, 0)).gather(1, tile_begins)
    counts = before.diff(dim=1)
    ordinal = torch.arange(room, device=device)
    first = torch.searchsorted(begun, (before[:, :-1, None] + ordinal + 1).view(batch, tiles * room))
    first = first.view(batch, tiles, room)
    following = torch.nn.functional.pad(first[:, :, 1:], (0, 1))
    end = torch.where(ordinal == counts[:, :, None] - 1, tile_begins[:, 1:, None], following)
    some_pixel = first.clamp(max=pixels - 1).view(batch, tiles * room)  # of unused segments any will do
    name = torch.where(name == num_labels, -1, name).gather(1, some_pixel).view(batch, tiles, room)
    begin = by_tile.gather(1, some_pixel).view(batch, tiles, room)
    return (
        order.to(torch.int32),
        offsets,
        counts.to(torch.int32),
        torch.stack((name, begin, end - first), -1).to(torch.int32),
    )
