"""Semantic cross-attention by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..outputs import empty_attention_outputs
from . import Library, contiguous, scalar_type


def semantic_cross_attention(
    library: Library,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    empty_value: Tensor | None,
    query_offsets: Tensor,
    query_order: Tensor | None,
    key_offsets: Tensor,
    key_order: Tensor | None,
    max_query_latents: int,
    max_key_latents: int,
    scale: float,
    empty: str,
) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp."""
    out, lse = empty_attention_outputs(query, value)
    library.prepare_result(out)
    empty_value = _like_lse(empty_value, lse)
    call = _call(
        library, query, key, value, empty_value, out, lse, query_offsets, query_order, key_offsets, key_order,
        max_query_latents, max_key_latents, scale, empty,
    )  # fmt: skip
    workspace = torch.empty(call.workspace_size(), dtype=torch.uint8, device=query.device)
    library.run(call.forward, query.device, workspace)
    return out, lse


def semantic_cross_attention_backward(
    library: Library,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    empty_value: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    query_offsets: Tensor,
    query_order: Tensor | None,
    key_offsets: Tensor,
    key_order: Tensor | None,
    max_query_latents: int,
    max_key_latents: int,
    scale: float,
    empty: str,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of query, key, value and empty_value; None for one that is not asked for."""
    *mask, wants_empty_value = output_mask
    gradients = [
        library.prepare_result(torch.empty_like(tensor)) if wanted else None
        for tensor, wanted in zip((query, key, value), mask, strict=True)
    ]
    grad_empty_value = lse.new_empty((*value.shape[:2], value.shape[3])) if wants_empty_value else None
    empty_value = _like_lse(empty_value, lse)
    call = _call(
        library, query, key, value, empty_value, out, lse, query_offsets, query_order, key_offsets, key_order,
        max_query_latents, max_key_latents, scale, empty,
    )  # fmt: skip
    workspace = torch.empty(call.backward_workspace_size(), dtype=torch.uint8, device=query.device)
    if grad_out is None:
        grad_out = query.new_zeros(()).expand(*query.shape[:3], value.shape[3])
    targets = (contiguous(grad_lse), grad_empty_value, grad_out, *gradients)
    library.run(call.backward, query.device, workspace, targets)
    return *gradients, None if grad_empty_value is None else grad_empty_value.to(query.dtype)


def _like_lse(empty_value: Tensor | None, lse: Tensor) -> Tensor | None:
    return None if empty_value is None else empty_value.to(lse.dtype).contiguous()


def _call(
    library: Library,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    empty_value: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    query_offsets: Tensor,
    query_order: Tensor | None,
    key_offsets: Tensor,
    key_order: Tensor | None,
    max_query_latents: int,
    max_key_latents: int,
    scale: float,
    empty: str,
) -> Any:
    batch, heads, queries, key_width = query.shape
    _, _, keys, value_width = value.shape
    return library.kernels().SemanticCrossAttention(
        (
            *library.settings(query.device, batch * heads * max(queries, keys) * (key_width + value_width)),
            scalar_type(query.dtype),
            batch,
            heads,
            key_width,
            value_width,
            empty == "uniform",
            empty_value,
            lse,
            *(queries, query_offsets, query_order, max_query_latents),
            *(keys, key_offsets, key_order, max_key_latents),
            query,
            key,
            value,
            out,
        ),
        scale,
    )
