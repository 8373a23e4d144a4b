"""Semantic cross-attention by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..outputs import empty_attention_outputs
from . import Library


def semantic_cross_attention(library: Library, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp."""
    query, _, value, empty_value = arguments[:4]
    out, lse = results = empty_attention_outputs(query, value)
    library.prepare_result(out)
    if empty_value is not None:
        arguments = (*arguments[:3], _like_lse(empty_value, value, lse), *arguments[4:])
    library.run("semantic_cross_attention", query, library.settings(query), arguments, results)
    return results


def semantic_cross_attention_backward(
    library: Library, grad_out: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of query, key, value and empty_value; None for one that is not asked for."""
    query, key, value, empty_value, out, lse, *rest, output_mask = arguments
    *mask, wants_empty_value = output_mask
    gradients = [
        library.prepare_result(torch.empty_like(tensor)) if wanted else None
        for tensor, wanted in zip((query, key, value), mask, strict=True)
    ]
    grad_empty_value = lse.new_empty((*value.shape[:2], value.shape[3])) if wants_empty_value else None
    if grad_out is None:
        grad_out = query.new_zeros(()).expand(*query.shape[:3], value.shape[3])
    if empty_value is not None:
        empty_value = _like_lse(empty_value, value, lse)
    library.run(
        "semantic_cross_attention_backward",
        query,
        library.settings(query),
        (query, key, value, empty_value, *rest),
        (out, lse),
        (grad_lse, grad_empty_value, grad_out, *gradients),
    )
    return *gradients, None if grad_empty_value is None else grad_empty_value.to(query.dtype)


def _like_lse(empty_value: Tensor, value: Tensor, lse: Tensor) -> Tensor:
    """What queries without keys get, as (B, H, Dv) of the type of the log-sum-exp."""
    batch, heads, _, width = value.shape
    return empty_value.to(lse.dtype).expand(batch, heads, width)
