"""Tokens grouped by label, as kernels find and load them; docs/design.md says how they are grouped."""

from __future__ import annotations

import triton
import triton.language as tl

from .products import product


@triton.jit
def label_at(offsets, label_count, position):
    """The label of a position; ``label_count`` if it has none."""
    low = tl.cast(0, tl.int32)
    high = tl.cast(label_count + 1, tl.int32)
    while low < high:
        middle = (low + high) // 2
        begins_before = tl.load(offsets + middle) <= position
        low = tl.where(begins_before, middle + 1, low)
        high = tl.where(begins_before, high, middle)
    return low - 1


@triton.jit
def load_offset(offsets, label):
    return tl.load(offsets + label).to(tl.int32)


@triton.jit
def tokens_at(order, positions, mask):
    """Which tokens are at these positions; without an order, those of the same number."""
    tokens = positions
    if order is not None:
        tokens = tl.load(order + positions, mask=mask, other=0)
    return tokens


@triton.jit
def token_pointers(base, tokens, token_stride, first_channel, channel_stride, BLOCK_WIDTH: tl.constexpr):
    channels = first_channel + tl.arange(0, BLOCK_WIDTH)
    return base + (tokens.to(tl.int64) * token_stride)[:, None] + (channels.to(tl.int64) * channel_stride)[None, :]


@triton.jit
def token_mask(mask, first_channel, width, BLOCK_WIDTH: tl.constexpr):
    return mask[:, None] & (first_channel + tl.arange(0, BLOCK_WIDTH) < width)[None, :]


@triton.jit
def load_tokens(base, tokens, mask, token_stride, first_channel, width, channel_stride, BLOCK_WIDTH: tl.constexpr):
    """Some channels of tokens (tokens, BLOCK_WIDTH); zero where there are none."""
    pointers = token_pointers(base, tokens, token_stride, first_channel, channel_stride, BLOCK_WIDTH)
    return tl.load(pointers, mask=token_mask(mask, first_channel, width, BLOCK_WIDTH), other=0.0)


@triton.jit
def token_products(
    rows, row_tokens, row_mask, row_token_stride, row_channel_stride,
    columns, column_tokens, column_mask, column_token_stride, column_channel_stride,
    width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products (rows, columns) of each row with each column, in float32."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        row = load_tokens(rows, row_tokens, row_mask, row_token_stride, first, width, row_channel_stride, BLOCK_WIDTH)
        column = load_tokens(
            columns, column_tokens, column_mask, column_token_stride, first, width, column_channel_stride, BLOCK_WIDTH
        )
        total = product(row, tl.trans(column), total, PRECISION)
    return total
