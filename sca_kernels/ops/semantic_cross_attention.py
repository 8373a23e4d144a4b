"""Semantic cross-attention: tokens attend to the tokens of their own label."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import backends
from ..labels import LabelMap, LatentLayout, LatentSelection
from ..outputs import empty_attention_outputs
from ..reference import semantic_cross_attention as reference
from .arguments import TYPES, broadcast, check_empty, check_images, check_selection, grouping
from .known_calls import Given, can_be_known, look_at
from .library import Saved, register

_OPERATOR = "semantic_cross_attention"

Tokens = LabelMap | LatentLayout | LatentSelection


@overload
def semantic_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tokens: Tokens,
    key_tokens: Tokens,
    *,
    scale: float | None = ...,
    empty: Literal["uniform", "zero"] = ...,
    empty_value: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def semantic_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tokens: Tokens,
    key_tokens: Tokens,
    *,
    scale: float | None = ...,
    empty: Literal["uniform", "zero"] = ...,
    empty_value: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def semantic_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tokens: Tokens,
    key_tokens: Tokens,
    *,
    scale: float | None = None,
    empty: Literal["uniform", "zero"] = "uniform",
    empty_value: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a query sees only the keys of its own label.

    For a query i with label l and the keys j of that label, in each image and head:

        out_i = sum_j softmax_j(scale * <query_i, key_j>) value_j,    lse_i = log sum_j exp(scale * <query_i, key_j>)

    Each side's tokens are the pixels of a :class:`LabelMap`, the latents of a :class:`LatentLayout` or a
    :class:`LatentSelection` of them: pixels attend to latents, latents to pixels, latents to latents, pixels to pixels.
    With k latents per label, the first three take O(n k D) time and O(n) memory for n tokens, whatever the number of
    labels. Between pixels it takes the sum of the products of the region sizes in time, and O(n) memory.

    Args:
        query: (B, H, Nq, D), as in ``torch.nn.functional.scaled_dot_product_attention``; any strides.
        key: (B, H, Nk, D), any strides.
        value: (B, H, Nk, Dv), any strides.
        query_tokens: what the Nq tokens are: a label map of Nq = height * width pixels in raster order, for B images or
            one for all; a layout of Nq latents; or a selection of Nq, for B images or one for all, which stands for its
            layout with absent labels owning none. What is left over of its rows has no label.
        key_tokens: the same for the Nk tokens; as many labels as ``query_tokens``.
        scale: factor of the logits. Default: 1 / sqrt(D).
        empty: what a query gets that has no key of its label (or no label): "uniform", the mean of all Nk values, which
            is what a dense mask with a large negative number gives, or "zero".
        empty_value: broadcastable to (B, H, Dv), of query's type, what such a query gets instead; ``empty`` is then
            unused. With a selection of keys, "uniform" needs it, since the values of absent labels are not there.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        out (B, H, Nq, Dv) in the type and memory order of ``query``; with ``return_lse`` also lse (B, H, Nq), float32
        (float64 for float64), -inf for a query without keys.

    Types: float32, float64, bfloat16, float16, the same for all tensors; arithmetic is in float32 or better. Under
    autocast they are cast to its type first.

    Gradients: of query, key, value and empty_value, through out and lse. They are deterministic and independent of the
    number of threads. Gradients of gradients are refused, except by ``backend("reference")``.

    Raises:
        TypeError: if the types differ or are not supported, or the tokens are none of the above.
        ValueError: if shapes, devices, numbers of tokens or numbers of labels do not agree, or ``empty_value`` is
            missing.

    Backends: ``cpu`` (the default on the CPU), ``triton`` (on GPUs where it is chosen, all but float64; it has never
    run on one), ``reference``.

    Source: Dufour et al., SCAM!, ECCV 2022, the masked attention of SCA and SAT.

    Example:
        >>> label_map = LabelMap.from_labels(torch.tensor([[0, 0], [1, 1]]), num_labels=2)
        >>> layout = LatentLayout((3, 1))
        >>> query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
        >>> value = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 2, 4, 1)
        >>> out = semantic_cross_attention(query, key, value, label_map, layout)
        >>> out[0, 0, 2:].flatten().tolist()  # label 1 owns the last latent alone
        [3.0, 3.0]
    """
    # A call like an earlier one skips the checks and preparations that follow.
    given: Given | None = None
    if can_be_known(_OPERATOR, query, query_tokens, key_tokens) and not torch.is_autocast_enabled("cpu"):
        (query_offsets, query_order, max_query_latents), of_queries = look_at(query_tokens)
        (key_offsets, key_order, max_key_latents), of_keys = look_at(key_tokens)
        tensors = (query, key, value, empty_value, query_offsets, query_order, key_offsets, key_order)
        given = (tensors, (max_query_latents, max_key_latents, scale, empty, *of_queries, *of_keys))
        results = _operator.run_known(*given)
        if results is not None:
            out, lse = results
            return (out, lse) if return_lse else out
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if empty_value is not None and not isinstance(empty_value, Tensor):
        raise TypeError(f"empty_value: expected a tensor or None, got {type(empty_value).__name__}")
    tokens = (query_tokens, key_tokens)
    device_type = query.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (_autocast(tensor, dtype) for tensor in (query, key, value))
        empty_value = None if empty_value is None else _autocast(empty_value, dtype)
        with torch.autocast(device_type, enabled=False):
            out, lse = _attend(query, key, value, empty_value, *tokens, scale, empty, None)
    else:
        out, lse = _attend(query, key, value, empty_value, *tokens, scale, empty, given)
    return (out, lse) if return_lse else out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    empty_value: Tensor | None,
    query_tokens: Tokens,
    key_tokens: Tokens,
    scale: float | None,
    empty: str,
    given: Given | None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, empty_value, query_tokens, key_tokens, empty)
    if empty_value is not None:
        batch, heads, _, width = value.shape
        empty_value = broadcast("empty_value", empty_value, (batch, heads, width))
    if scale is None:
        scale = max(query.shape[3], 1) ** -0.5
    backend = backends.resolve(_OPERATOR, query.device, query.dtype)
    if backend == "reference":
        return reference.semantic_cross_attention(
            query,
            key,
            value,
            empty_value,
            _token_labels(query_tokens, query.device),
            _token_labels(key_tokens, query.device),
            query_tokens.num_labels,
            scale=scale,
            empty=empty,
        )
    query_offsets, query_order, max_query_latents = grouping(query_tokens, query.device)
    key_offsets, key_order, max_key_latents = grouping(key_tokens, query.device)
    out, lse = _operator.run(
        (query, key, value, empty_value, query_offsets, query_order, key_offsets, key_order),
        (max_query_latents, max_key_latents, scale, empty, backend),
        given,
    )
    return out, lse


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    empty_value: Tensor | None,
    query_tokens: Tokens,
    key_tokens: Tokens,
    empty: str,
) -> None:
    dtype, device = query.dtype, query.device
    if dtype not in TYPES:
        raise TypeError(f"query: expected float32, float64, bfloat16 or float16, got {dtype}")
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not len(query_shape) == len(key_shape) == len(value_shape) == 4:
        for name, shape in (("query", query_shape), ("key", key_shape), ("value", value_shape)):
            if len(shape) != 4:
                raise ValueError(f"{name}: expected shape (B, H, N, D), got {tuple(shape)}")
    if key.dtype != dtype or value.dtype != dtype or key.device != device or value.device != device:
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype} like query, got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(f"{name}: expected a tensor on {device} like query, got one on {tensor.device}")
    if empty_value is not None:
        if empty_value.dtype != dtype:
            raise TypeError(f"empty_value: expected {dtype} like query, got {empty_value.dtype}")
        if empty_value.device != device:
            raise ValueError(f"empty_value: expected a tensor on {device} like query, got one on {empty_value.device}")
    batch, heads, queries, width = query_shape
    keys = key_shape[2]
    if key_shape != (batch, heads, keys, width):
        raise ValueError(f"key: expected shape ({batch}, {heads}, Nk, {width}) to match query, got {tuple(key_shape)}")
    if value_shape[:3] != (batch, heads, keys):
        raise ValueError(f"value: expected shape ({batch}, {heads}, {keys}, Dv) to match key, got {tuple(value_shape)}")
    _check_tokens("query", query_tokens, device, batch, queries)
    _check_tokens("key", key_tokens, device, batch, keys)
    if query_tokens.num_labels != key_tokens.num_labels:
        raise ValueError(
            f"key_tokens: expected {query_tokens.num_labels} labels like query_tokens, got {key_tokens.num_labels}"
        )
    check_empty(empty)
    if empty_value is None and empty == "uniform" and isinstance(key_tokens, LatentSelection):
        raise ValueError(
            "empty_value: expected it with a selection of keys and empty='uniform', "
            "since that holds not all of the values whose mean that is, got None"
        )


def _check_tokens(side: str, tokens: Tokens, device: torch.device, batch: int, count: int) -> None:
    if isinstance(tokens, LabelMap):
        check_images(f"{side}_tokens", tokens, batch, device, "query")
        _, height, width = tokens.labels.shape
        if height * width != count:
            raise ValueError(
                f"{side}_tokens: expected a label map of {count} pixels, the tokens of {side}, "
                f"got {height} x {width} (use at(height, width) to resize it)"
            )
    elif isinstance(tokens, LatentLayout | LatentSelection):
        kind = "layout"
        if isinstance(tokens, LatentSelection):
            check_selection(f"{side}_tokens", tokens, batch, device, "query")
            kind = "selection"
        if tokens.count != count:
            raise ValueError(
                f"{side}_tokens: expected a {kind} of {count} latents, the tokens of {side}, got {tokens.count}"
            )
    else:
        raise TypeError(
            f"{side}_tokens: expected a LabelMap, a LatentLayout or a LatentSelection, got {type(tokens).__name__}"
        )


def _token_labels(tokens: Tokens, device: torch.device) -> Tensor:
    if isinstance(tokens, LabelMap):
        return tokens.labels.flatten(1)
    return torch.atleast_2d(tokens.labels(device))


def _save(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> Saved:
    query, key, value, empty_value, query_offsets, query_order, key_offsets, key_order, *settings = arguments
    out, lse = results
    # rowsum(dO * O) = rowsum(P * dP): latent keys give that in passing, and an output of 16 bits would spoil it.
    saved_out = out if key_order is not None and lse.dtype == out.dtype else None
    groupings = (query_offsets, query_order, key_offsets, key_order)
    return (query, key, value, empty_value, saved_out, lse, *groupings), tuple(settings)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_attention_outputs(query, value)


def _backward_fake(
    grad_out: Tensor | None, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    *mask, wants_empty_value = rest[-1]
    gradients = (
        torch.empty_like(tensor) if wanted else None for tensor, wanted in zip((query, key, value), mask, strict=True)
    )
    batch, heads, _, width = value.shape
    return *gradients, value.new_empty((batch, heads, width)) if wants_empty_value else None


_INPUTS_SCHEMA = "Tensor query, Tensor key, Tensor value, Tensor? empty_value"
_GROUPING_SCHEMA = "Tensor query_offsets, Tensor? query_order, Tensor key_offsets, Tensor? key_order"
_SETTINGS_SCHEMA = "int max_query_latents, int max_key_latents, float scale, str empty, str backend"
_operator = register(
    _OPERATOR,
    f"({_INPUTS_SCHEMA}, {_GROUPING_SCHEMA}, {_SETTINGS_SCHEMA}) -> (Tensor out, Tensor lse)",
    f"(Tensor? grad_out, Tensor? grad_lse, {_INPUTS_SCHEMA}, Tensor? out, Tensor lse,"
    f" {_GROUPING_SCHEMA}, {_SETTINGS_SCHEMA}, bool[4] output_mask)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_empty_value)",
    differentiable=("query", "key", "value", "empty_value"),
    save=_save,
    fake=_fake,
    backward_fake=_backward_fake,
)
