"""The plan of a label map: its pixels grouped by label, and the labels of each tile."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..labels import plan_shapes
from .library import LIBRARY

LIBRARY.define(
    "label_plan(Tensor labels, int num_labels, int tile_height, int tile_width)"
    " -> (Tensor order, Tensor offsets, Tensor tile_counts, Tensor tile_segments)"
)


def _fake(labels: Tensor, num_labels: int, tile_height: int, tile_width: int) -> tuple[Tensor, ...]:
    order, offsets, tile_counts, tile_segments = plan_shapes(labels, num_labels, tile_height, tile_width)
    return (
        labels.new_empty(order),
        labels.new_empty(offsets, dtype=torch.int64),
        labels.new_empty(tile_counts),
        labels.new_empty(tile_segments),
    )


def _dispatch(labels: Tensor, num_labels: int, tile_height: int, tile_width: int) -> tuple[Tensor, ...]:
    # A plan is the same whoever makes it, so a forced backend is not asked.
    backend = backends.default("label_plan", labels.device, labels.dtype)
    return backends.implementation("label_plan", backend)(labels, num_labels, tile_height, tile_width)


torch.library.register_fake("sca::label_plan", _fake, lib=LIBRARY)
LIBRARY.impl("label_plan", _dispatch, "CompositeExplicitAutograd")
