"""The kernels of semantic_cross_attention, forward.

Queries are walked in blocks in the order of labels, so that nearly all blocks hold one label and the others a few.
Where latents attend to pixels, there are too few queries for that: then the pixels are walked in chunks, each chunk
leaves a partial result for the latents of each of its labels, and a second kernel merges these in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import weighted_product
from .tokens import label_at, load_offset, load_tokens, token_mask, token_pointers, token_products, tokens_at


@triton.jit
def _attend(
    query, query_tokens, query_mask, query_token, query_channel, key, key_token, key_channel,
    value, value_token, value_channel, key_order, first_key, end_key, first_channel,
    maximum, weight_sum, total, key_width, value_width, scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the keys of a label into the running maximum, sum and weighted sum of the queries of that label."""
    for column in range(first_key, end_key, BLOCK_COLUMNS):
        positions = column + tl.arange(0, BLOCK_COLUMNS)
        mask = positions < end_key
        tokens = tokens_at(key_order, positions, mask)
        logits = scale * token_products(
            query, query_tokens, query_mask, query_token, query_channel,
            key, tokens, mask, key_token, key_channel,
            key_width, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_KEY, PRECISION,
        )  # fmt: skip
        logits = tl.where(query_mask[:, None] & mask[None, :], logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        # For a query of another label all is -inf, whose differences are not numbers.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(maximum - base)
        values = load_tokens(value, tokens, mask, value_token, first_channel, value_width, value_channel, BLOCK_VALUE)
        new_total = weighted_product(weights, values, total * shrink[:, None], PRECISION)
        # Selected, since what is not a number would reach queries of other labels through weights of zero.
        total = tl.where(query_mask[:, None], new_total, total)
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        maximum = new_maximum
    return maximum, weight_sum, total


@triton.jit
def attend_by_query(
    query, query_image, query_head, query_token, query_channel,
    key, key_image, key_head, key_token, key_channel,
    value, value_image, value_head, value_token, value_channel,
    out, out_image, out_head, out_token, out_channel,
    lse, instead, query_offsets, query_offsets_image, query_order, query_order_image,
    key_offsets, key_offsets_image, key_order, key_order_image,
    heads, query_count, label_count, key_width, value_width, value_blocks, scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Completes a block of queries in the order of labels, for some channels of the values."""
    blocks = tl.cdiv(query_count, BLOCK_ROWS)
    first_channel = tl.program_id(0) % value_blocks * BLOCK_VALUE
    begin = tl.program_id(0) // value_blocks % blocks * BLOCK_ROWS
    index = (tl.program_id(0) // value_blocks // blocks).to(tl.int64)
    image, head = index // heads, index % heads
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    query_offsets += image * query_offsets_image
    key_offsets += image * key_offsets_image
    if query_order is not None:
        query_order += image * query_order_image
    if key_order is not None:
        key_order += image * key_order_image

    positions = begin + tl.arange(0, BLOCK_ROWS)
    inside = positions < query_count
    tokens = tokens_at(query_order, positions, inside)
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
    matched = positions < 0
    label = label_at(query_offsets, label_count, begin)
    low = load_offset(query_offsets, label)
    while (label < label_count) & (low < begin + BLOCK_ROWS):
        high = load_offset(query_offsets, label + 1)
        mask = inside & (positions >= low) & (positions < high)
        first_key = load_offset(key_offsets, label)
        end_key = load_offset(key_offsets, label + 1)
        maximum, weight_sum, total = _attend(
            query, tokens, mask, query_token, query_channel, key, key_token, key_channel,
            value, value_token, value_channel, key_order, first_key, end_key, first_channel,
            maximum, weight_sum, total, key_width, value_width, scale,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_KEY, BLOCK_VALUE, PRECISION,
        )  # fmt: skip
        matched = matched | (mask & (end_key > first_key))
        label += 1
        low = high

    channels = first_channel + tl.arange(0, BLOCK_VALUE)
    uniform = tl.load(instead + index * value_width + channels, mask=channels < value_width, other=0.0)
    result = tl.where(matched[:, None], total / tl.where(matched, weight_sum, 1.0)[:, None], uniform[None, :])
    out += image * out_image + head * out_head
    pointers = token_pointers(out, tokens, out_token, first_channel, out_channel, BLOCK_VALUE)
    mask = token_mask(inside, first_channel, value_width, BLOCK_VALUE)
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)
    if first_channel == 0:
        result_lse = tl.where(matched, maximum + tl.log(tl.where(matched, weight_sum, 1.0)), float("-inf"))
        tl.store(lse + index * query_count + tokens, result_lse, mask=inside)


@triton.jit
def attend_by_key_chunk(
    query, query_image, query_head, query_token, query_channel,
    key, key_image, key_head, key_token, key_channel,
    value, value_image, value_head, value_token, value_channel,
    partial, partial_maximum, partial_sum, query_offsets, query_offsets_image,
    key_offsets, key_offsets_image, key_order, key_order_image,
    heads, key_count, label_count, max_latents, partial_rows, key_width, value_width, value_blocks, scale,
    TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The partial results of all latents whose labels a chunk of pixels holds, for some channels of the values."""
    CHUNK: tl.constexpr = TILES * BLOCK_COLUMNS
    chunks = tl.cdiv(key_count, CHUNK)
    first_channel = tl.program_id(0) % value_blocks * BLOCK_VALUE
    chunk = tl.program_id(0) // value_blocks % chunks
    index = (tl.program_id(0) // value_blocks // chunks).to(tl.int64)
    image, head = index // heads, index % heads
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    query_offsets += image * query_offsets_image
    key_offsets += image * key_offsets_image
    key_order += image * key_order_image

    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, key_count)
    label = label_at(key_offsets, label_count, begin)
    low = load_offset(key_offsets, label)
    while (label < label_count) & (low < end):
        high = load_offset(key_offsets, label + 1)
        end_query = load_offset(query_offsets, label + 1)
        for first_query in range(load_offset(query_offsets, label), end_query, BLOCK_ROWS):
            queries = first_query + tl.arange(0, BLOCK_ROWS)
            mask = queries < end_query
            maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
            total = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
            maximum, weight_sum, total = _attend(
                query, queries, mask, query_token, query_channel, key, key_token, key_channel,
                value, value_token, value_channel, key_order, tl.maximum(low, begin), tl.minimum(high, end),
                first_channel, maximum, weight_sum, total, key_width, value_width, scale,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_KEY, BLOCK_VALUE, PRECISION,
            )  # fmt: skip
            rows = index * partial_rows + tl.cast(chunk, tl.int64) * max_latents + queries
            pointers = token_pointers(partial, rows, value_width, first_channel, 1, BLOCK_VALUE)
            tl.store(pointers, total, mask=token_mask(mask, first_channel, value_width, BLOCK_VALUE))
            if first_channel == 0:
                tl.store(partial_maximum + rows, maximum, mask=mask)
                tl.store(partial_sum + rows, weight_sum, mask=mask)
        label += 1
        low = high


@triton.jit
def merge_key_chunks(
    partial, partial_maximum, partial_sum, out, out_image, out_head, out_token, out_channel, lse, instead,
    query_offsets, query_offsets_image, key_offsets, key_offsets_image,
    heads, query_count, label_count, max_latents, partial_rows, value_width, value_blocks,
    CHUNK: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Merges the partial results of a latent in the order of the chunks, for some channels of the values."""
    first_channel = tl.program_id(0) % value_blocks * BLOCK_VALUE
    query = tl.program_id(0) // value_blocks % query_count
    index = (tl.program_id(0) // value_blocks // query_count).to(tl.int64)
    image, head = index // heads, index % heads
    query_offsets += image * query_offsets_image
    key_offsets += image * key_offsets_image
    channels = first_channel + tl.arange(0, BLOCK_VALUE)
    mask = channels < value_width

    label = label_at(query_offsets, label_count, query)
    first_key = load_offset(key_offsets, label)
    end_key = load_offset(key_offsets, tl.minimum(label + 1, label_count))
    maximum = tl.full((1,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((1,), tl.float32)
    total = tl.zeros((BLOCK_VALUE,), tl.float32)
    if end_key > first_key:
        for chunk in range(first_key // CHUNK, (end_key - 1) // CHUNK + 1):
            row = index * partial_rows + tl.cast(chunk, tl.int64) * max_latents + query
            chunk_maximum = tl.load(partial_maximum + row + tl.arange(0, 1))
            new_maximum = tl.maximum(maximum, chunk_maximum)
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            shrink, share = tl.exp(maximum - base), tl.exp(chunk_maximum - base)
            weight_sum = weight_sum * shrink + tl.load(partial_sum + row + tl.arange(0, 1)) * share
            values = tl.load(partial + row * value_width + channels, mask=mask, other=0.0)
            total = total * shrink + values * share
            maximum = new_maximum
    matched = end_key > first_key
    uniform = tl.load(instead + index * value_width + channels, mask=mask, other=0.0)
    result = tl.where(matched, total / tl.where(matched, weight_sum, 1.0), uniform)
    out += image * out_image + head * out_head + tl.cast(query, tl.int64) * out_token
    tl.store(out + channels.to(tl.int64) * out_channel, result.to(out.dtype.element_ty), mask=mask)
    if first_channel == 0:
        result_lse = tl.where(matched, maximum + tl.log(tl.where(matched, weight_sum, 1.0)), float("-inf"))
        tl.store(lse + index * query_count + query + tl.arange(0, 1), result_lse)
