"""The plan of a label map by the compiled counting sort."""

from __future__ import annotations

import torch
from torch import Tensor

from ..labels import plan_shapes
from . import native, settings


def label_plan(
    labels: Tensor, num_labels: int, tile_height: int, tile_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :class:`sca_kernels.labels.LabelPlan`."""
    batch, height, width = labels.shape
    order_shape, offsets_shape, counts_shape, segments_shape = plan_shapes(labels, num_labels, tile_height, tile_width)
    order = torch.empty(order_shape, dtype=torch.int32)
    offsets = torch.empty(offsets_shape, dtype=torch.int64)
    tile_counts = torch.empty(counts_shape, dtype=torch.int32)
    tile_segments = torch.empty(segments_shape, dtype=torch.int32)
    workspace = torch.empty(max(torch.get_num_threads(), batch) * (num_labels + 1), dtype=torch.int32)
    native.label_plan(
        (
            *settings(labels),
            *(batch, height, width, num_labels, tile_height, tile_width),
            labels,
            *(order, offsets, tile_counts, tile_segments),
            workspace,
        )
    )
    return order, offsets, tile_counts, tile_segments
