"""Pooling of raw features by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import tile_size
from ..outputs import empty_pool_outputs
from . import Library, scalar_type
from .arguments import ABSENT, address, contiguous, latent_tokens, pixel_tokens, strided


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
    library.run(call.forward, x.device, workspace.data_ptr())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, x, row_bias and col_bias; one that is not asked for is an empty tensor."""
    wants_queries, wants_x, wants_row_bias, wants_col_bias = output_mask
    queries, row_bias, col_bias = queries.contiguous(), contiguous(row_bias), contiguous(col_bias)
    grad_queries = queries.new_empty(queries.shape if wants_queries else 0)
    grad_x = library.prepare_result(torch.empty_like(x)) if wants_x else x.new_empty(0)
    grad_row_bias = queries.new_empty(row_mass.shape if wants_row_bias else 0)
    grad_col_bias = queries.new_empty(col_mass.shape if wants_col_bias else 0)
    results = (pooled, lse, row_mass, col_mass, mean, second_moment)
    call = _call(library, queries, x, cu_latents, offsets, order, row_bias, col_bias, results, max_latents, empty)
    workspace = torch.empty(call.backward_workspace_size(), dtype=torch.uint8, device=x.device)
    incoming = [
        contiguous(gradient)
        for gradient in (grad_pooled, grad_lse, grad_row_mass, grad_col_mass, grad_mean, grad_second_moment)
    ]
    library.run(
        call.backward,
        x.device,
        workspace.data_ptr(),
        (
            *map(address, incoming),
            *(strided(grad_x) if wants_x else ABSENT),
            grad_queries.data_ptr() if wants_queries else 0,
            grad_row_bias.data_ptr() if wants_row_bias else 0,
            grad_col_bias.data_ptr() if wants_col_bias else 0,
        ),
    )
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
            *latent_tokens(latents, cu_latents, max_latents),
            *pixel_tokens(pixels, offsets, order),
            *strided(x),
            queries.data_ptr(),
            address(row_bias),
            address(col_bias),
            *(result.data_ptr() for result in results),
        )
    )
