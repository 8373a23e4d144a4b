"""Semantic cross-attention by the compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..outputs import empty_attention_outputs
from . import capability, native, prepare_result, scalar_type, thread_count

_ABSENT = (0, 0, 0, 0, 0)  # a tensor that is not there


def semantic_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    prepare_result(out)
    call = _call(
        query, key, value, out, lse, query_offsets, query_order, key_offsets, key_order,
        max_query_latents, max_key_latents, scale, empty,
    )  # fmt: skip
    workspace = torch.empty(call.workspace_size(), dtype=torch.uint8)
    call.forward(workspace.data_ptr())
    return out, lse


def semantic_cross_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value; one that ``output_mask`` does not ask for is an empty tensor."""
    gradients = [
        prepare_result(torch.empty_like(tensor)) if wanted else tensor.new_empty(0)
        for tensor, wanted in zip((query, key, value), output_mask, strict=True)
    ]
    call = _call(
        query, key, value, out, lse, query_offsets, query_order, key_offsets, key_order,
        max_query_latents, max_key_latents, scale, empty,
    )  # fmt: skip
    workspace = torch.empty(call.workspace_size(), dtype=torch.uint8)
    if grad_out is None:
        grad_out = query.new_zeros(()).expand(*query.shape[:3], value.shape[3])
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    targets = [
        (gradient.data_ptr(), *gradient.stride()) if wanted else _ABSENT
        for gradient, wanted in zip(gradients, output_mask, strict=True)
    ]
    call.backward(
        workspace.data_ptr(),
        (
            0 if grad_lse is None else grad_lse.data_ptr(),
            grad_out.data_ptr(),
            *grad_out.stride(),
            *targets[0],
            *targets[1],
            *targets[2],
        ),
    )
    query_gradient, key_gradient, value_gradient = gradients
    return query_gradient, key_gradient, value_gradient


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    return native.SemanticCrossAttention(
        (
            capability(),
            thread_count(batch * heads * max(queries, keys) * (key_width + value_width)),
            scalar_type(query.dtype),
            batch,
            heads,
            key_width,
            value_width,
            empty == "uniform",
            lse.data_ptr(),
            *_tokens(queries, query_offsets, query_order, max_query_latents),
            *_tokens(keys, key_offsets, key_order, max_key_latents),
            query.data_ptr(),
            *query.stride(),
            key.data_ptr(),
            *key.stride(),
            value.data_ptr(),
            *value.stride(),
            *(_ABSENT if out is None else (out.data_ptr(), *out.stride())),
        ),
        scale,
    )


def _tokens(count: int, offsets: Tensor, order: Tensor | None, max_per_label: int) -> tuple[int, ...]:
    if order is None:
        return count, offsets.shape[0] - 1, offsets.data_ptr(), 0, 0, 0, max_per_label
    images, places = offsets.shape
    if images == 1:  # one map for all images
        return count, places - 1, offsets.data_ptr(), 0, order.data_ptr(), 0, 0
    return count, places - 1, offsets.data_ptr(), places, order.data_ptr(), count, 0
