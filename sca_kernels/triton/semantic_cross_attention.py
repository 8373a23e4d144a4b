"""Semantic cross-attention in Triton: what allocates for the kernels and launches them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..outputs import empty_attention_outputs
from .attention_backward import backward_by_row, merge_row_blocks
from .attention_forward import attend_by_key_chunk, attend_by_query, merge_key_chunks
from .launch import Configuration, configuration, launch
from .moments import merge_sums
from .products import product_precision

_ABSENT = (None, 0, 0, 0, 0)


@dataclass(frozen=True)
class _Side:
    """The tokens of query or key.

    Attributes:
        count: number of tokens in an image.
        offsets: of labels, int64 (images, s + 1) or (s + 1).
        order: of pixels, or None where the tokens are latents.
        max_latents: the most latents of a label; of pixels 0.
    """

    count: int
    offsets: Tensor
    order: Tensor | None
    max_latents: int

    @property
    def num_labels(self) -> int:
        return self.offsets.shape[-1] - 1

    @property
    def offsets_with_stride(self) -> tuple[Tensor, int]:
        shared = self.offsets.dim() == 1 or self.offsets.shape[0] == 1
        return self.offsets, 0 if shared else self.num_labels + 1

    @property
    def order_with_stride(self) -> tuple[Tensor | None, int]:
        return self.order, 0 if self.order is None or self.order.shape[0] == 1 else self.count


def semantic_cross_attention(
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
    queries = _Side(query.shape[2], query_offsets, query_order, max_query_latents)
    keys = _Side(key.shape[2], key_offsets, key_order, max_key_latents)
    out, lse = empty_attention_outputs(query, value)
    _attend(query, key, value, out, lse, _instead(value, empty_value, empty), queries, keys, scale)
    return out, lse


def semantic_cross_attention_backward(
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
    queries = _Side(query.shape[2], query_offsets, query_order, max_query_latents)
    keys = _Side(key.shape[2], key_offsets, key_order, max_key_latents)
    if grad_out is None:
        grad_out = query.new_zeros(()).expand(*query.shape[:3], value.shape[3])
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    wants_query, wants_key, wants_value, wants_empty_value = output_mask
    grad_query, grad_key, grad_value = (
        torch.empty_like(tensor) if wanted else None
        for tensor, wanted in zip((query, key, value), output_mask[:3], strict=True)
    )
    spreads = wants_value and empty == "uniform" and empty_value is None
    sums_unmatched = spreads or wants_empty_value

    unmatched = spread = None
    if keys.order is None:
        calls = _Backward(query, grad_out, key, value, grad_lse, lse, None, queries, keys, scale, True)
        unmatched = calls.run(grad_query, None, wants_key, wants_value, None, sums_unmatched)
        spread = _spread(unmatched, keys) if spreads else None
        calls.merge(grad_key, grad_value, spread)
    else:
        if sums_unmatched and queries.order is None:
            there = (lse == -torch.inf).unsqueeze(-1)
            unmatched = torch.where(there, grad_out, 0).sum(2, dtype=torch.float32)
        delta = _delta(query, key, value, out, grad_out, queries, keys, scale)
        if queries.order is not None and (wants_query or sums_unmatched):
            calls = _Backward(query, grad_out, key, value, grad_lse, lse, delta, queries, keys, scale, True)
            unmatched = calls.run(grad_query, None, False, False, None, sums_unmatched)
        spread = _spread(unmatched, keys) if spreads else None
        if wants_key or wants_value or queries.order is None:
            calls = _Backward(key, value, query, grad_out, grad_lse, lse, delta, keys, queries, scale, False)
            calls.run(grad_key, grad_value, wants_query and queries.order is None, False, spread, False)
            if queries.order is None:
                calls.merge(grad_query, None, None)
    grad_empty_value = unmatched.to(query.dtype) if unmatched is not None and wants_empty_value else None
    return grad_query, grad_key, grad_value, grad_empty_value


def _instead(value: Tensor, empty_value: Tensor | None, empty: str) -> Tensor:
    """What queries without keys get, float32 (B, H, Dv)."""
    batch, heads, keys, width = value.shape
    if empty_value is not None:
        return empty_value.float().contiguous()
    if empty == "uniform" and keys > 0:
        return value.mean(2, dtype=torch.float32)
    return torch.zeros((batch, heads, width), dtype=torch.float32, device=value.device)


def _spread(unmatched: Tensor | None, keys: _Side) -> Tensor:
    """What each value gets from the queries without keys."""
    assert unmatched is not None
    return unmatched / max(keys.count, 1)


def _delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    grad_out: Tensor,
    queries: _Side,
    keys: _Side,
    scale: float,
) -> Tensor:
    """rowsum(P * dP) = rowsum(dO * O) of each query.

    An output that was rounded to 16 bits would carry its error into the gradients: then it is computed again.
    """
    if out is None:
        out = torch.empty((*query.shape[:3], value.shape[3]), dtype=torch.float32, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        instead = torch.zeros((*value.shape[:2], value.shape[3]), dtype=torch.float32, device=query.device)
        _attend(query, key, value, out, lse, instead, queries, keys, scale)
    return (grad_out * out).sum(-1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    instead: Tensor,
    queries: _Side,
    keys: _Side,
    scale: float,
) -> None:
    batch, heads, _, key_width = query.shape
    value_width = value.shape[3]
    by_chunk = queries.order is None and keys.order is not None
    config = _configuration("attend_by_key_chunk" if by_chunk else "attend_by_query", query, keys)
    block_key, block_value = _width_block(config, key_width), _width_block(config, value_width)
    value_blocks = max(triton.cdiv(value_width, block_value), 1)
    tokens = [part for tensor in (query, key, value) for part in (tensor, *tensor.stride())]
    results = (out, *out.stride(), lse, instead)
    constants = {
        **_options(config),
        "BLOCK_KEY": block_key,
        "BLOCK_VALUE": block_value,
        "PRECISION": product_precision(query.dtype),
    }
    if not by_chunk:
        launch(
            attend_by_query,
            (batch * heads * triton.cdiv(queries.count, config["BLOCK_ROWS"]) * value_blocks,),
            *(*tokens, *results, *queries.offsets_with_stride, *queries.order_with_stride),
            *(*keys.offsets_with_stride, *keys.order_with_stride),
            *(heads, queries.count, queries.num_labels, key_width, value_width, value_blocks, scale),
            **constants,
        )
        return
    chunk = config["TILES"] * config["BLOCK_COLUMNS"]
    chunks = triton.cdiv(keys.count, chunk)
    partial_rows = chunks * queries.max_latents + queries.count
    shape = (batch * heads, partial_rows)
    partial = torch.empty((*shape, value_width), dtype=torch.float32, device=query.device)
    partial_maximum, partial_sum = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
    launch(
        attend_by_key_chunk,
        (batch * heads * chunks * value_blocks,),
        *(*tokens, partial, partial_maximum, partial_sum, *queries.offsets_with_stride),
        *(*keys.offsets_with_stride, *keys.order_with_stride),
        *(heads, keys.count, keys.num_labels, queries.max_latents, partial_rows),
        *(key_width, value_width, value_blocks, scale),
        **constants,
    )
    launch(
        merge_key_chunks,
        (batch * heads * queries.count * value_blocks,),
        *(partial, partial_maximum, partial_sum, *results),
        *(*queries.offsets_with_stride, *keys.offsets_with_stride),
        *(heads, queries.count, queries.num_labels, queries.max_latents, partial_rows, value_width, value_blocks),
        CHUNK=chunk,
        BLOCK_VALUE=block_value,
        num_warps=1,
    )


class _Backward:
    """The pass that walks the tokens of one side, the rows, and completes their gradients.

    Args:
        row_first, row_second: query and grad_out where the rows are queries, key and value where they are keys.
        column_first, column_second: those of the other side.
        delta: of the queries; None where it is to be made on the way, from keys that are latents.
    """

    def __init__(
        self,
        row_first: Tensor,
        row_second: Tensor,
        column_first: Tensor,
        column_second: Tensor,
        grad_lse: Tensor | None,
        lse: Tensor,
        delta: Tensor | None,
        rows: _Side,
        columns: _Side,
        scale: float,
        query_rows: bool,
    ) -> None:
        self.tensors = (row_first, row_second, column_first, column_second)
        self.of_queries = (lse, grad_lse, delta)
        self.rows, self.columns, self.scale, self.query_rows = rows, columns, scale, query_rows
        self.images, self.heads, _, self.key_width = row_first.shape
        self.value_width = row_second.shape[3]
        self.config = _configuration("attention_backward", row_first, columns)
        self.block_key = _width_block(self.config, self.key_width)
        self.block_value = _width_block(self.config, self.value_width)
        self.blocks = triton.cdiv(rows.count, self.config["BLOCK_ROWS"])
        self.partial_rows = self.blocks * columns.max_latents + columns.count
        self.partials: list[Tensor | None] = []

    def run(
        self,
        grad_first: Tensor | None,
        grad_second: Tensor | None,
        wants_column_first: bool,
        wants_column_second: bool,
        spread: Tensor | None,
        sums_unmatched: bool,
    ) -> Tensor | None:
        """Writes the gradients of the rows, keeps partial ones of the columns.

        Returns:
            with ``sums_unmatched``, the sum of the gradients of queries without keys (B, H, Dv).
        """
        widths, device = (self.key_width, self.value_width), self.tensors[0].device
        groups = self.images * self.heads
        self.partials = [
            torch.empty((groups, self.partial_rows, width), dtype=torch.float32, device=device) if wanted else None
            for width, wanted in zip(widths, (wants_column_first, wants_column_second), strict=True)
        ]
        unmatched = None
        if sums_unmatched:
            unmatched = torch.empty((1, self.blocks, groups * self.value_width), dtype=torch.float32, device=device)
        width_blocks = max(
            triton.cdiv(self.key_width, self.block_key), triton.cdiv(self.value_width, self.block_value), 1
        )
        targets = [_ABSENT if grad is None else (grad, *grad.stride()) for grad in (grad_first, grad_second)]
        launch(
            backward_by_row,
            (groups * self.blocks * width_blocks,),
            *(part for tensor in self.tensors for part in (tensor, *tensor.stride())),
            *(part for target in targets for part in target),
            *(*self.partials, unmatched, *self.of_queries, spread),
            *(*self.rows.offsets_with_stride, *self.rows.order_with_stride),
            *(*self.columns.offsets_with_stride, *self.columns.order_with_stride),
            *(self.heads, self.rows.count, self.columns.count, self.rows.num_labels, self.columns.max_latents),
            *(self.partial_rows, self.key_width, self.value_width, width_blocks, self.scale),
            **_options(self.config),
            QUERY_ROWS=self.query_rows,
            ONE_TILE=self.columns.order is None and self.columns.max_latents <= self.config["BLOCK_COLUMNS"],
            BLOCK_KEY=self.block_key,
            BLOCK_VALUE=self.block_value,
            PRECISION=product_precision(self.tensors[0].dtype),
        )
        if unmatched is None:
            return None
        return merge_sums(unmatched).view(self.images, self.heads, self.value_width)

    def merge(self, grad_first: Tensor | None, grad_second: Tensor | None, spread: Tensor | None) -> None:
        """Writes the gradients of the columns, which are latents; ``spread`` is added to the second."""
        parts = zip(
            self.partials,
            (grad_first, grad_second),
            (None, spread),
            (self.key_width, self.value_width),
            (self.block_key, self.block_value),
            strict=True,
        )
        for partial, grad, share, width, block in parts:
            if partial is None or grad is None:
                continue
            width_blocks = triton.cdiv(width, block)
            launch(
                merge_row_blocks,
                (self.images * self.heads * self.columns.count * width_blocks,),
                *(partial, grad, *grad.stride(), share),
                *(*self.rows.offsets_with_stride, *self.columns.offsets_with_stride),
                *(self.heads, self.columns.count, self.columns.num_labels, self.columns.max_latents),
                *(self.partial_rows, width, width_blocks),
                CHUNK=self.config["BLOCK_ROWS"],
                BLOCK_WIDTH=block,
                num_warps=1,
            )


def _configuration(kernel: str, tokens: Tensor, columns: _Side) -> Configuration:
    size_class = "pixels" if columns.order is not None else "many latents" if columns.max_latents > 16 else "latents"
    return configuration(kernel, size_class, tokens.device, tokens.dtype)


def _options(config: Configuration) -> dict[str, int]:
    return {name: value for name, value in config.options.items() if name != "MOST_WIDTH"}


def _width_block(config: Configuration, width: int) -> int:
    """So many channels are held at once: all, if they are not too many."""
    return min(max(triton.next_power_of_2(width), 16), config["MOST_WIDTH"])
