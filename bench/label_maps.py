"""Label maps to benchmark with: (1, height, width) int32, the same for the same arguments."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sca_kernels import LabelMap

PHOTOGRAPHS = Path(__file__).parent.parent / "demo" / "labels"
PHOTOGRAPHED_LABELS = 3
BLOBS = (4, 16, 64)  # pixels across


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


def blobs(height: int, width: int, num_labels: int, size: int) -> Tensor:
    """Cells of about ``size`` x ``size`` pixels around jittered centres, each with a random label."""
    rows, columns = height // size + 3, width // size + 3
    generator = torch.Generator().manual_seed(num_labels)
    jitter = torch.rand(2, rows, columns, generator=generator)
    label_of_cell = torch.randint(num_labels, (rows, columns), generator=generator, dtype=torch.int32)
    # A border of cells lies outside the image, so that every pixel has eight around its own.
    row, column = torch.meshgrid(torch.arange(height) / size + 1, torch.arange(width) / size + 1, indexing="ij")
    nearest = torch.full((height, width), torch.inf)
    labels = torch.zeros(height, width, dtype=torch.int32)
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        cell = row.long() + down, column.long() + right
        distance = (cell[0] + jitter[0][cell] - row) ** 2 + (cell[1] + jitter[1][cell] - column) ** 2
        labels = torch.where(distance < nearest, label_of_cell[cell], labels)
        nearest = torch.minimum(nearest, distance)
    return labels[None]


def photograph(height: int, width: int, num_labels: int, number: int = 0) -> Tensor:
    """A label map of the demonstration (background, face, body), resized."""
    path = sorted(PHOTOGRAPHS.glob("*.png"))[number]
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
    kinds: dict[str, Callable[[int, int, int], Tensor]] = {
        kind.__name__: kind for kind in (regions, blocks, stripes, one_label, random)
    }
    kinds |= {f"blobs_{size}": functools.partial(blobs, size=size) for size in BLOBS}
    if any(PHOTOGRAPHS.glob("*.png")):
        kinds |= {"photograph": photograph, "photograph_2": functools.partial(photograph, number=1), "parts": parts}
    return kinds
