"""Pooling of raw features by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import tile_size
from ..outputs import empty_pool_outputs
from . import Library, contiguous, scalar_type


def semantic_pool(
    library: Library,
    queries: Tensor,
    x: Tensor,
    cu_latents: Tensor,
    offsets: Tensor,
    order: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    max_latents: int,
    empty: str,
) -> tuple[Tensor, ...]:
    """Returns pooled, lse, row_mass, col_mass, mean, second_moment."""
    queries, row_bias, col_bias = queries.contiguous(), contiguous(row_bias), contiguous(col_bias)
    results = empty_pool_outputs(queries, x)
    call = _call(library, queries, x, cu_latents, offsets, order, row_bias, col_bias, results, max_latents, empty)
    workspace = torch.empty(call.workspace_size(), dtype=torch.uint8, device=x.device)
    library.run(call.forward, x.device, workspace)
    return results


def semantic_pool_backward(
    library: Library,
    grad_pooled: Tensor | None,
    grad_lse: Tensor | None,
    grad_row_mass: Tensor | None,
    grad_col_mass: Tensor | None,
    grad_mean: Tensor | None,
    grad_second_moment: Tensor | None,
    queries: Tensor,
    x: Tensor,
    pooled: Tensor,
    lse: Tensor,
    row_mass: Tensor,
    col_mass: Tensor,
    mean: Tensor,
    second_moment: Tensor,
    cu_latents: Tensor,
    offsets: Tensor,
    order: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    max_latents: int,
    empty: str,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of queries, x, row_bias and col_bias; None for one that is not asked for."""
    wants_queries, wants_x, wants_row_bias, wants_col_bias = output_mask
    queries, row_bias, col_bias = queries.contiguous(), contiguous(row_bias), contiguous(col_bias)
    grad_queries = queries.new_empty(queries.shape) if wants_queries else None
    grad_x = library.prepare_result(torch.empty_like(x)) if wants_x else None
    grad_row_bias = queries.new_empty(row_mass.shape) if wants_row_bias else None
    grad_col_bias = queries.new_empty(col_mass.shape) if wants_col_bias else None
    results = (pooled, lse, row_mass, col_mass, mean, second_moment)
    call = _call(library, queries, x, cu_latents, offsets, order, row_bias, col_bias, results, max_latents, empty)
    workspace = torch.empty(call.backward_workspace_size(), dtype=torch.uint8, device=x.device)
    incoming = map(contiguous, (grad_pooled, grad_lse, grad_row_mass, grad_col_mass, grad_mean, grad_second_moment))
    targets = (*incoming, grad_x, grad_queries, grad_row_bias, grad_col_bias)
    library.run(call.backward, x.device, workspace, targets)
    return grad_queries, grad_x, grad_row_bias, grad_col_bias


def _call(
    library: Library,
    queries: Tensor,
    x: Tensor,
    cu_latents: Tensor,
    offsets: Tensor,
    order: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    results: tuple[Tensor, ...],
    max_latents: int,
    empty: str,
) -> Any:
    batch, channels, height, width = x.shape
    _, heads, latents, _ = queries.shape
    pixels = height * width
    return library.kernels().SemanticPool(
        (
            *library.settings(x.device, batch * pixels * channels * max_latents * heads),
            scalar_type(x.dtype),
            empty == "uniform",
            *(batch, heads, channels, height, width),
            *tile_size(height, width),
            *(latents, cu_latents, None, max_latents),
            *(pixels, offsets, order, 0),
            x,
            queries,
            row_bias,
            col_bias,
            *results,
        )
    )
