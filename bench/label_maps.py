"""Label maps to benchmark with: (1, height, width) int32, the same for the same arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sca_kernels import LabelMap

PHOTOGRAPHS = Path(__file__).parent.parent / "demo" / "labels"


def regions(height: int, width: int, num_labels: int) -> Tensor:
    """Smooth regions of uneven sizes, a few for each label, as in a segmented photograph.

    Every label has a smooth random field, and a pixel belongs to the label whose field is highest.
    """
    generator = torch.Generator().manual_seed(num_labels)
    # About three regions for a label, whatever the number of labels.
    nodes = max(6, round(math.sqrt(3 * num_labels)))
    highest = torch.full((1, height, width), -torch.inf)
    labels = torch.zeros(1, height, width, dtype=torch.int32)
    for label in range(num_labels):
        coarse = torch.randn(1, 1, nodes, nodes, generator=generator)
        field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
        labels.masked_fill_(field > highest, label)
        highest = torch.maximum(highest, field)
    return labels


def blocks(height: int, width: int, num_labels: int) -> Tensor:
    """A grid of 8 x 8 rectangles, the labels in turn."""
    rows = torch.arange(height) * 8 // height
    columns = torch.arange(width) * 8 // width
    return ((rows[:, None] * 8 + columns) % num_labels).to(torch.int32)[None]


def stripes(height: int, width: int, num_labels: int) -> Tensor:
    """Vertical stripes of four pixels, the labels in turn: every row of pixels meets many labels."""
    stripe = torch.arange(width) // 4 % num_labels
    return stripe.to(torch.int32).expand(1, height, width).contiguous()


def one_label(height: int, width: int, num_labels: int) -> Tensor:
    """All pixels have the first label."""
    return torch.zeros(1, height, width, dtype=torch.int32)


def random(height: int, width: int, num_labels: int) -> Tensor:
    """Every pixel has a random label of its own."""
    generator = torch.Generator().manual_seed(num_labels)
    return torch.randint(num_labels, (1, height, width), generator=generator, dtype=torch.int32)


def photograph(height: int, width: int, num_labels: int) -> Tensor:
    """The first label map of the demonstration (background, face, body), resized."""
    path = min(PHOTOGRAPHS.glob("*.png"))
    return LabelMap.from_png(path, num_labels).at(height, width).labels.contiguous()


def parts(height: int, width: int, num_labels: int) -> Tensor:
    """The areas of :func:`photograph`, each cut by a grid of 4 x 2: twenty parts, spread evenly over the labels."""
    areas = photograph(512, 512, 3)
    rows, columns = torch.arange(512) // 128, torch.arange(512) // 256
    cells = areas * 8 + rows[:, None] * 2 + columns
    present, index = torch.unique(cells, return_inverse=True)
    labels = index * num_labels // present.numel()
    return LabelMap.from_labels(labels, num_labels).at(height, width).labels.contiguous()


def makers() -> dict[str, Callable[[int, int, int], Tensor]]:
    """The kinds of maps that can be made here, by name."""
    kinds = [regions, blocks, stripes, one_label, random]
    if any(PHOTOGRAPHS.glob("*.png")):
        kinds.append(photograph)
    return {kind.__name__: kind for kind in kinds}
