"""The kernels of semantic_cross_attention, backward.

With P = exp(scale * Q K^T - lse) over the pairs of equal label, dP = dO V^T, delta = rowsum(P * dP):

    dS = scale * P * (dP - delta + dlse),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO.

Both sides look alike: rows ``first`` (query or key) are multiplied for P and rows ``second`` (grad_out or value) for
dP. One side's tokens are walked in blocks, in the order of labels, and get their gradients; the other side's, if they
are latents, get partial gradients from each block, which a second kernel merges in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import weighted_product
from .tokens import label_at, load_offset, load_tokens, token_mask, token_pointers, token_products, tokens_at


@triton.jit
def _weights_and_gradients(
    row_first, row_second, row_tokens, row_mask, row_first_token, row_first_channel, row_second_token,
    row_second_channel, column_first, column_second, column_tokens, column_mask,
    column_first_token, column_first_channel, column_second_token, column_second_channel,
    lse, key_width, value_width, scale,
    QUERY_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dP of a block of rows and a block of columns."""
    logits = scale * token_products(
        row_first, row_tokens, row_mask, row_first_token, row_first_channel,
        column_first, column_tokens, column_mask, column_first_token, column_first_channel,
        key_width, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_KEY, PRECISION,
    )  # fmt: skip
    if QUERY_ROWS:
        logits -= tl.load(lse + row_tokens, mask=row_mask, other=0.0)[:, None]
    else:
        logits -= tl.load(lse + column_tokens, mask=column_mask, other=0.0)[None, :]
    weights = tl.where(row_mask[:, None] & column_mask[None, :], tl.exp(logits), 0.0)
    grads = token_products(
        row_second, row_tokens, row_mask, row_second_token, row_second_channel,
        column_second, column_tokens, column_mask, column_second_token, column_second_channel,
        value_width, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_VALUE, PRECISION,
    )  # fmt: skip
    return weights, grads


@triton.jit
def backward_by_row(
    row_first, row_first_image, row_first_head, row_first_token, row_first_channel,
    row_second, row_second_image, row_second_head, row_second_token, row_second_channel,
    column_first, column_first_image, column_first_head, column_first_token, column_first_channel,
    column_second, column_second_image, column_second_head, column_second_token, column_second_channel,
    grad_first, grad_first_image, grad_first_head, grad_first_token, grad_first_channel,
    grad_second, grad_second_image, grad_second_head, grad_second_token, grad_second_channel,
    partial_first, partial_second, partial_unmatched, lse, grad_lse, delta, spread,
    row_offsets, row_offsets_image, row_order, row_order_image,
    column_offsets, column_offsets_image, column_order, column_order_image,
    heads, row_count, column_count, label_count, max_latents, partial_rows, key_width, value_width, width_blocks, scale,
    QUERY_ROWS: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of rows, for some channels; partial ones of the columns, if there is memory for them.

    Args:
        delta: of the queries, or None where the rows are queries and their keys latents: then it is made here.
        spread: what each value gets from the queries without keys, or None.
        partial_unmatched: the sum of the gradients of the block's queries without keys goes there.
        ONE_TILE: whether the latents of a label fit one block of columns.
    """
    blocks = tl.cdiv(row_count, BLOCK_ROWS)
    width_block = tl.program_id(0) % width_blocks
    block = tl.program_id(0) // width_blocks % blocks
    index = (tl.program_id(0) // width_blocks // blocks).to(tl.int64)
    first_key_channel, first_value_channel = width_block * BLOCK_KEY, width_block * BLOCK_VALUE
    image, head = index // heads, index % heads
    row_first += image * row_first_image + head * row_first_head
    row_second += image * row_second_image + head * row_second_head
    column_first += image * column_first_image + head * column_first_head
    column_second += image * column_second_image + head * column_second_head
    row_offsets += image * row_offsets_image
    column_offsets += image * column_offsets_image
    if row_order is not None:
        row_order += image * row_order_image
    if column_order is not None:
        column_order += image * column_order_image
    queries = index * (row_count if QUERY_ROWS else column_count)
    lse += queries

    begin = block * BLOCK_ROWS
    positions = begin + tl.arange(0, BLOCK_ROWS)
    inside = positions < row_count
    tokens = tokens_at(row_order, positions, inside)
    total_first = tl.zeros((BLOCK_ROWS, BLOCK_KEY), tl.float32)
    total_second = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
    matched = positions < 0
    label = label_at(row_offsets, label_count, begin)
    low = load_offset(row_offsets, label)
    while (label < label_count) & (low < begin + BLOCK_ROWS):
        high = load_offset(row_offsets, label + 1)
        mask = inside & (positions >= low) & (positions < high)
        first_column = load_offset(column_offsets, label)
        end_column = load_offset(column_offsets, label + 1)
        matched = matched | (mask & (end_column > first_column))
        of_row = tl.zeros((BLOCK_ROWS,), tl.float32)  # dlse - delta of queries that are rows
        if QUERY_ROWS:
            if grad_lse is not None:
                of_row += tl.load(grad_lse + queries + tokens, mask=mask, other=0.0)
            if delta is not None:
                of_row -= tl.load(delta + queries + tokens, mask=mask, other=0.0)
            elif not ONE_TILE:
                for column in range(first_column, end_column, BLOCK_COLUMNS):
                    column_positions = column + tl.arange(0, BLOCK_COLUMNS)
                    column_mask = column_positions < end_column
                    column_tokens = tokens_at(column_order, column_positions, column_mask)
                    weights, grads = _weights_and_gradients(
                        row_first, row_second, tokens, mask, row_first_token, row_first_channel, row_second_token,
                        row_second_channel, column_first, column_second, column_tokens, column_mask,
                        column_first_token, column_first_channel, column_second_token, column_second_channel,
                        lse, key_width, value_width, scale,
                        QUERY_ROWS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_KEY, BLOCK_VALUE, PRECISION,
                    )  # fmt: skip
                    of_row -= tl.sum(weights * grads, 1)
        for column in range(first_column, end_column, BLOCK_COLUMNS):
            column_positions = column + tl.arange(0, BLOCK_COLUMNS)
            column_mask = column_positions < end_column
            column_tokens = tokens_at(column_order, column_positions, column_mask)
            weights, grads = _weights_and_gradients(
                row_first, row_second, tokens, mask, row_first_token, row_first_channel, row_second_token,
                row_second_channel, column_first, column_second, column_tokens, column_mask,
                column_first_token, column_first_channel, column_second_token, column_second_channel,
                lse, key_width, value_width, scale,
                QUERY_ROWS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_KEY, BLOCK_VALUE, PRECISION,
            )  # fmt: skip
            if QUERY_ROWS:
                if delta is None and ONE_TILE:
                    grads -= tl.sum(weights * grads, 1)[:, None]
                grads += of_row[:, None]
            else:
                of_column = -tl.load(delta + queries + column_tokens, mask=column_mask, other=0.0)
                if grad_lse is not None:
                    of_column += tl.load(grad_lse + queries + column_tokens, mask=column_mask, other=0.0)
                grads += of_column[None, :]
            grads = tl.where(mask[:, None] & column_mask[None, :], scale * weights * grads, 0.0)

            # Selected, since what is not a number would reach rows of other labels through weights of zero.
            if grad_first is not None:
                factors = load_tokens(
                    column_first, column_tokens, column_mask, column_first_token, first_key_channel, key_width,
                    column_first_channel, BLOCK_KEY,
                )  # fmt: skip
                total_first = tl.where(
                    mask[:, None], weighted_product(grads, factors, total_first, PRECISION), total_first
                )
            if grad_second is not None:
                factors = load_tokens(
                    column_second, column_tokens, column_mask, column_second_token, first_value_channel, value_width,
                    column_second_channel, BLOCK_VALUE,
                )  # fmt: skip
                total_second = tl.where(
                    mask[:, None], weighted_product(weights, factors, total_second, PRECISION), total_second
                )
            partial_row = index * partial_rows + tl.cast(block, tl.int64) * max_latents + column_positions
            if partial_first is not None:
                factors = load_tokens(
                    row_first, tokens, mask, row_first_token, first_key_channel, key_width, row_first_channel, BLOCK_KEY
                )
                zero = tl.zeros((BLOCK_COLUMNS, BLOCK_KEY), tl.float32)
                part = weighted_product(tl.trans(grads), factors, zero, PRECISION)
                pointers = token_pointers(partial_first, partial_row, key_width, first_key_channel, 1, BLOCK_KEY)
                tl.store(pointers, part, mask=token_mask(column_mask, first_key_channel, key_width, BLOCK_KEY))
            if partial_second is not None:
                factors = load_tokens(
                    row_second, tokens, mask, row_second_token, first_value_channel, value_width, row_second_channel,
                    BLOCK_VALUE,
                )  # fmt: skip
                zero = tl.zeros((BLOCK_COLUMNS, BLOCK_VALUE), tl.float32)
                part = weighted_product(tl.trans(weights), factors, zero, PRECISION)
                pointers = token_pointers(partial_second, partial_row, value_width, first_value_channel, 1, BLOCK_VALUE)
                tl.store(pointers, part, mask=token_mask(column_mask, first_value_channel, value_width, BLOCK_VALUE))
        label += 1
        low = high

    value_channels = first_value_channel + tl.arange(0, BLOCK_VALUE)
    if grad_first is not None:
        grad_first += image * grad_first_image + head * grad_first_head
        pointers = token_pointers(
            grad_first, tokens, grad_first_token, first_key_channel, grad_first_channel, BLOCK_KEY
        )
        row_mask = token_mask(inside, first_key_channel, key_width, BLOCK_KEY)
        tl.store(pointers, total_first.to(grad_first.dtype.element_ty), mask=row_mask)
    if grad_second is not None:
        if spread is not None:
            share = tl.load(spread + index * value_width + value_channels, mask=value_channels < value_width, other=0.0)
            total_second += share[None, :]
        grad_second += image * grad_second_image + head * grad_second_head
        pointers = token_pointers(
            grad_second, tokens, grad_second_token, first_value_channel, grad_second_channel, BLOCK_VALUE
        )
        row_mask = token_mask(inside, first_value_channel, value_width, BLOCK_VALUE)
        tl.store(pointers, total_second.to(grad_second.dtype.element_ty), mask=row_mask)
    if partial_unmatched is not None:
        grad_out = load_tokens(
            row_second, tokens, inside & ~matched, row_second_token, first_value_channel, value_width,
            row_second_channel, BLOCK_VALUE,
        ).to(tl.float32)  # fmt: skip
        images = tl.num_programs(0) // width_blocks // blocks
        target = partial_unmatched + (tl.cast(block, tl.int64) * images + index) * value_width + value_channels
        tl.store(target, tl.sum(grad_out, 0), mask=value_channels < value_width)


@triton.jit
def merge_row_blocks(
    partial, grad, grad_image, grad_head, grad_token, grad_channel, spread,
    row_offsets, row_offsets_image, column_offsets, column_offsets_image,
    heads, column_count, label_count, max_latents, partial_rows, width, width_blocks,
    CHUNK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of a latent: its partial ones in the order of the blocks of rows, and its share of ``spread``."""
    first_channel = tl.program_id(0) % width_blocks * BLOCK_WIDTH
    column = tl.program_id(0) // width_blocks % column_count
    index = (tl.program_id(0) // width_blocks // column_count).to(tl.int64)
    image, head = index // heads, index % heads
    row_offsets += image * row_offsets_image
    column_offsets += image * column_offsets_image
    channels = first_channel + tl.arange(0, BLOCK_WIDTH)
    mask = channels < width
    label = label_at(column_offsets, label_count, column)
    first_row = load_offset(row_offsets, label)
    end_row = load_offset(row_offsets, tl.minimum(label + 1, label_count))
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    if end_row > first_row:
        for block in range(first_row // CHUNK, (end_row - 1) // CHUNK + 1):
            row = index * partial_rows + tl.cast(block, tl.int64) * max_latents + column
            total += tl.load(partial + row * width + channels, mask=mask, other=0.0)
    if spread is not None:
        total += tl.load(spread + index * width + channels, mask=mask, other=0.0)
    grad += image * grad_image + head * grad_head + tl.cast(column, tl.int64) * grad_token
    tl.store(grad + channels.to(tl.int64) * grad_channel, total.to(grad.dtype.element_ty), mask=mask)
