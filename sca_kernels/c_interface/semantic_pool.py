"""Pooling of raw features by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import tile_size
from ..outputs import empty_pool_outputs
from . import Library


def semantic_pool(library: Library, *arguments: Any) -> tuple[Tensor, ...]:
    """Returns pooled, lse, row_mass, col_mass, mean, second_moment."""
    queries, x = arguments[:2]
    results = empty_pool_outputs(queries, x)
    library.run("semantic_pool", x, _settings(library, x), arguments, results)
    return results


def semantic_pool_backward(library: Library, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Returns the gradients of queries, x, row_bias and col_bias; None for one that is not asked for."""
    incoming, (queries, x), results = arguments[:6], arguments[6:8], arguments[8:14]
    rest, (wants_queries, wants_x, wants_row_bias, wants_col_bias) = arguments[14:-1], arguments[-1]
    _, _, row_mass, col_mass, _, _ = results
    grad_queries = queries.new_empty(queries.shape) if wants_queries else None
    grad_x = library.prepare_result(torch.empty_like(x)) if wants_x else None
    grad_row_bias = queries.new_empty(row_mass.shape) if wants_row_bias else None
    grad_col_bias = queries.new_empty(col_mass.shape) if wants_col_bias else None
    library.run(
        "semantic_pool_backward",
        x,
        _settings(library, x),
        (queries, x, *rest),
        results,
        (*incoming, grad_x, grad_queries, grad_row_bias, grad_col_bias),
    )
    return grad_queries, grad_x, grad_row_bias, grad_col_bias


def _settings(library: Library, x: Tensor) -> tuple[int, ...]:
    _, _, height, width = x.shape
    return *library.settings(x), *tile_size(height, width)
