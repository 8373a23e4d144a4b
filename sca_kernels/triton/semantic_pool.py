"""Pooling of raw features on a GPU.

Forward: each block of pixels of a label leaves partial rows (maximum, sum, weighted features) and its moments; they are
merged in the order of the blocks. The logits wait in the order of the image until the log-sum-exp is known, for the
masses. Backward: with a = exp(logits - lse), over the pixels p of a latent's label, and dA = <dO, x_p> + dR[row] +
dC[column]:

    dS = a * (dA - delta),  delta = <dO, O> + <dR, R> + <dC, C> - dlse,
    dx_p = sum_latents (a dO + dS query) + what the moments and the latents without pixels add,
    dquery = sum_p dS x_p,  and dS summed over the rows and columns of the image gives those of the biases.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..outputs import empty_pool_outputs
from .features import load_channels, pixel_pointers, store_channels, strides_of
from .label_blocks import (
    LabelBlocks,
    add_partial_rows,
    blocks_of,
    by_position,
    contiguous,
    find_block,
    image_stride,
    latents_of,
    load_rows,
    pixels_of_block,
    rows_of,
    store_rows,
)
from .launch import configuration, launch
from .position_sums import add_up_positions
from .position_values import load_values, position_values, store_labels, store_values
from .products import float32_precision


def semantic_pool(
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
    batch, channels, height, width = x.shape
    heads, latents = queries.shape[1:3]
    blocks = LabelBlocks("pool_blocks", x, heads, latents, max_latents, offsets.shape[1] - 1)
    results = empty_pool_outputs(queries, x)
    pooled, lse, row_mass, col_mass, mean, second_moment = results
    rows = (batch, heads, blocks.partial_rows)
    partial = (queries.new_empty(rows), queries.new_empty(rows), queries.new_empty((*rows, channels)))
    moments = (
        offsets.new_empty((batch, blocks.programs)),
        queries.new_empty((batch, blocks.programs, channels), dtype=torch.float64),
        queries.new_empty((batch, blocks.programs, channels)),
    )
    values, labels = position_values(x, blocks)
    flat, [strides] = strides_of(x)
    launch(
        _pool_blocks,
        (blocks.programs * blocks.parts, batch),
        x, queries.contiguous(), contiguous(row_bias), contiguous(col_bias), cu_latents, offsets, order,
        *partial, *moments, values, labels,
        *strides, *map(image_stride, (cu_latents, offsets, order)),
        heads, latents, max_latents, blocks.num_labels, blocks.partial_rows, height, width, blocks.parts,
        channels=channels, FLAT=flat, PRECISION=float32_precision(x.dtype), **blocks.rows, **blocks.cut.options,
    )  # fmt: skip
    cut = configuration("merge_block_moments", "any", x.device, x.dtype)
    launch(
        _merge_block_moments,
        (triton.cdiv(channels, cut["CHANNELS"]), batch),
        *moments, mean, second_moment,
        blocks.programs, channels, height * width,
        **cut.options,
    )  # fmt: skip
    cut = configuration("merge_pools", "any", x.device, x.dtype)
    launch(
        _merge_pools,
        (latents, max(triton.cdiv(channels, cut["CHANNELS"]), 1), batch * heads),
        *partial, cu_latents, offsets, mean, pooled, lse, row_mass, col_mass,
        image_stride(cu_latents), image_stride(offsets),
        heads, max_latents, blocks.num_labels, blocks.partial_rows, channels, height, width,
        UNIFORM=empty == "uniform", PIXELS=blocks.cut["PIXELS"], **cut.options,
    )  # fmt: skip
    add_up_positions(values, labels, blocks, cu_latents, "rows", row_mass, lse)
    add_up_positions(values, labels, blocks, cu_latents, "columns", col_mass, lse)
    return results


def semantic_pool_backward(
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
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of queries, x, row_bias and col_bias; None for one that is not asked for."""
    wants_queries, wants_x, wants_row_bias, wants_col_bias = output_mask
    batch, channels, height, width = x.shape
    heads, latents = queries.shape[1:3]
    blocks = LabelBlocks("pool_backward_blocks", x, heads, latents, max_latents, offsets.shape[1] - 1)
    grad_pooled, grad_row_mass, grad_col_mass = map(contiguous, (grad_pooled, grad_row_mass, grad_col_mass))
    delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse
    for gradient, result in ((grad_pooled, pooled), (grad_row_mass, row_mass), (grad_col_mass, col_mass)):
        if gradient is not None:
            delta = delta + (gradient * result).sum(-1)
    # What each pixel gets alike: the gradient of x is offset + factor (x - mean), and what its latents add.
    offset, factor = torch.zeros_like(mean), torch.zeros_like(mean)
    share = 1 / max(height * width, 1)
    if grad_mean is not None:
        offset = grad_mean * share
    if grad_pooled is not None and empty == "uniform":
        offset = offset + torch.where(lse.unsqueeze(-1) == -torch.inf, grad_pooled, 0).sum((1, 2)) * share
    if grad_second_moment is not None:
        factor = grad_second_moment * (2 * share)

    grad_x = torch.empty_like(x) if wants_x else None
    later = grad_x is not None and blocks.parts > 1
    partial = queries.new_empty((batch, heads, blocks.partial_rows, channels)) if wants_queries else None
    gradients, labels = position_values(x, blocks)
    weights = torch.empty_like(gradients) if later and grad_pooled is not None else None
    grouping = (cu_latents, offsets, order)
    queries, offset, factor = queries.contiguous(), offset.contiguous(), factor.contiguous()
    precision = float32_precision(x.dtype)
    flat, [x_strides, grad_x_strides] = strides_of(x, grad_x)
    launch(
        _pool_backward_blocks,
        (blocks.programs * blocks.parts, batch),
        x, queries, contiguous(row_bias), contiguous(col_bias), *grouping,
        lse, delta.contiguous(), grad_pooled, grad_row_mass, grad_col_mass, offset, factor, mean,
        None if later else grad_x, partial,
        weights, gradients if later or wants_row_bias or wants_col_bias else None, labels,
        *x_strides, *grad_x_strides, *map(image_stride, grouping),
        heads, latents, max_latents, blocks.num_labels, blocks.partial_rows, height, width, blocks.parts,
        channels=channels, FLAT=flat, PRECISION=precision, **blocks.rows, **blocks.cut.options,
    )  # fmt: skip
    if later:
        second = LabelBlocks("pool_backward_features", x, heads, latents, max_latents, offsets.shape[1] - 1)
        launch(
            _pool_backward_features,
            (second.programs * triton.cdiv(channels, second.cut["CHANNELS"]), batch),
            x, queries, grad_pooled, offset, factor, mean, *grouping, weights, gradients, grad_x,
            *x_strides, *grad_x_strides, *map(image_stride, grouping),
            heads, latents, max_latents, second.num_labels, height, width,
            channels=channels, FLAT=flat, PRECISION=precision, **second.rows, **second.cut.options,
        )  # fmt: skip
    grad_queries = grad_row_bias = grad_col_bias = None
    if partial is not None:
        grad_queries = add_partial_rows(blocks, partial, cu_latents, offsets)
    if wants_row_bias:
        grad_row_bias = add_up_positions(gradients, labels, blocks, cu_latents, "rows", torch.zeros_like(row_mass))
    if wants_col_bias:
        grad_col_bias = add_up_positions(gradients, labels, blocks, cu_latents, "columns", torch.zeros_like(col_mass))
    return grad_queries, grad_x, grad_row_bias, grad_col_bias


@triton.jit
def _pool_blocks(
    x, queries, row_bias, col_bias, cu_latents, offsets, order,
    partial_max, partial_sum, partial_pooled, block_sizes, block_means, block_squares, values, labels,
    image_stride, channel_stride, row_stride, column_stride, cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, partial_rows, height, width, parts,
    channels: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    LATENTS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One part of the rows of a block; that of the first does what needs no rows."""
    program = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    image = tl.program_id(1).to(tl.int64)
    block = image * (tl.num_programs(0) // parts) + program
    label, begin, end = find_block(offsets + image * offsets_stride, num_labels, height * width, program, PIXELS)
    tl.store(block_sizes + block, tl.maximum(end - begin, 0), mask=part == 0)
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    row, is_row = rows_of(part * ROWS, image, heads, latents, first, count, LATENTS, ROWS)
    there = inside[:, None] & is_row[None, :]
    x = pixel_pointers(x, image, pixel, width, image_stride, row_stride, column_stride, FLAT)

    logits = by_position(row_bias, col_bias, row, pixel, height, width, there)
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        known = inside[:, None] & (channel < channels)[None, :]
        features = load_channels(x, channel_stride, channel, known)
        table = load_rows(queries, row, is_row, channel, channels)
        logits = tl.dot(features, tl.trans(table), logits, input_precision=PRECISION)
    logits = tl.where(there, logits, float("-inf"))
    largest = tl.max(logits, 0)
    # Where all logits are -inf, their weights are zero rather than exp(-inf + inf).
    weights = tl.exp(logits - tl.where(largest > float("-inf"), largest, 0.0)[None, :])

    first += (program - label).to(tl.int64) * max_latents
    partial, _ = rows_of(part * ROWS, image, heads, partial_rows, first, count, LATENTS, ROWS)
    size = (end - begin).to(tl.float32)
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        known = inside[:, None] & (channel < channels)[None, :]
        features = load_channels(x, channel_stride, channel, known)
        pooled = tl.dot(tl.trans(weights), features, input_precision=PRECISION)
        store_rows(partial_pooled, pooled, partial, is_row, channel, channels)
        # Moments of the differences from the first pixel, so that a large mean does not drown them.
        is_first = tl.arange(0, PIXELS) == 0
        shift = tl.sum(tl.where(is_first[:, None], features, 0.0), 0)
        difference = tl.where(known, features - shift[None, :], 0.0)
        mean = tl.sum(difference, 0) / size
        square = tl.where(known, difference - mean[None, :], 0.0)
        place = block * channels + channel
        tl.store(block_means + place, shift.to(tl.float64) + mean, mask=(channel < channels) & (part == 0))
        tl.store(block_squares + place, tl.sum(square * square, 0), mask=(channel < channels) & (part == 0))
    tl.store(partial_max + partial, largest, mask=is_row)
    tl.store(partial_sum + partial, tl.sum(weights, 0), mask=is_row)
    slot, _ = rows_of(part * ROWS, image, heads, max_latents, 0, count, LATENTS, ROWS)
    store_values(values, logits, slot, is_row, pixel, inside, height * width)
    store_labels(labels, label, image, pixel, inside & (part == 0), height * width)


@triton.jit
def _merge_block_moments(
    block_sizes, block_means, block_squares, mean, second_moment,
    blocks, channels, pixels,
    BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    block_sizes += image * blocks
    size = tl.cast(tl.maximum(pixels, 1), tl.float64)
    total = tl.zeros([CHANNELS], tl.float64)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        sizes = tl.load(block_sizes + block, mask=block < blocks, other=0)
        known = (sizes > 0)[:, None] & (channel < channels)[None, :]
        places = (image * blocks + block)[:, None] * channels + channel[None, :]
        means = tl.load(block_means + places, mask=known, other=0.0)
        total += tl.sum(sizes.to(tl.float64)[:, None] * means, 0)
    total /= size
    # Chan's formula for all blocks at once: their own squares, and those of their means' distances from the mean.
    squares = tl.zeros([CHANNELS], tl.float64)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        sizes = tl.load(block_sizes + block, mask=block < blocks, other=0)
        known = (sizes > 0)[:, None] & (channel < channels)[None, :]
        places = (image * blocks + block)[:, None] * channels + channel[None, :]
        distance = tl.where(known, tl.load(block_means + places, mask=known, other=0.0) - total[None, :], 0.0)
        within = tl.load(block_squares + places, mask=known, other=0.0).to(tl.float64)
        squares += tl.sum(within + sizes.to(tl.float64)[:, None] * distance * distance, 0)
    tl.store(mean + image * channels + channel, total, mask=channel < channels)
    tl.store(second_moment + image * channels + channel, squares / size, mask=channel < channels)


@triton.jit
def _merge_pools(
    partial_max, partial_sum, partial_pooled, cu_latents, offsets, mean, pooled, lse, row_mass, col_mass,
    cu_latents_stride, offsets_stride,
    heads, max_latents, num_labels, partial_rows, channels, height, width,
    UNIFORM: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(2).to(tl.int64)
    image = group // heads
    first, count = blocks_of(
        cu_latents + image * cu_latents_stride, offsets + image * offsets_stride, num_labels, latent, PIXELS
    )
    base = group * partial_rows + first * max_latents + latent
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([CHANNELS], tl.float32)
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        partial = base + slot.to(tl.int64) * max_latents
        block_max = tl.load(partial_max + partial, mask=slot < count, other=float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(block_max, 0))
        finite = tl.where(largest > float("-inf"), largest, 0.0)
        factor = tl.exp(before - finite)
        factors = tl.exp(block_max - finite)
        total = total * factor + tl.sum(factors * tl.load(partial_sum + partial, mask=slot < count, other=0.0), 0)
        known = (slot < count)[:, None] & (channel < channels)[None, :]
        rows = tl.load(partial_pooled + partial[:, None] * channels + channel[None, :], mask=known, other=0.0)
        sums = sums * factor + tl.sum(factors[:, None] * rows, 0)
    row = group * tl.num_programs(0) + latent
    if count > 0:
        sums = sums / total
    elif UNIFORM:
        sums = tl.load(mean + image * channels + channel, mask=channel < channels)
    tl.store(pooled + row * channels + channel, sums, mask=channel < channels)
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.max(largest + tl.log(total), 0))
        # For latents without pixels. For others it is zero, and where a line has pixels its sum will replace it.
        absent = tl.zeros([CHANNELS], tl.float32)
        if UNIFORM:
            absent += (count == 0).to(tl.float32)
        for start in range(0, height, CHANNELS):
            line = start + tl.arange(0, CHANNELS)
            tl.store(row_mass + row * height + line, absent / height, mask=line < height)
        for start in range(0, width, CHANNELS):
            line = start + tl.arange(0, CHANNELS)
            tl.store(col_mass + row * width + line, absent / width, mask=line < width)


@triton.jit
def _of_moments(features, offset, factor, mean, image, channel, channels):
    """What the gradient of x has whatever the latents of a pixel are."""
    place = image * channels + channel
    mask = channel < channels
    centred = features - tl.load(mean + place, mask=mask, other=0.0)[None, :]
    result = tl.load(factor + place, mask=mask, other=0.0)[None, :] * centred
    return result + tl.load(offset + place, mask=mask, other=0.0)[None, :]


@triton.jit
def _pool_backward_blocks(
    x, queries, row_bias, col_bias, cu_latents, offsets, order,
    lse, delta, grad_pooled, grad_row_mass, grad_col_mass, offset, factor, mean,
    grad_x, partial_queries, all_weights, all_gradients, labels,
    image_stride, channel_stride, row_stride, column_stride,
    grad_image_stride, grad_channel_stride, grad_row_stride, grad_column_stride,
    cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, partial_rows, height, width, parts,
    channels: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    LATENTS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One part of the rows of a block; of several, weights and gradients of logits are left to the next kernel."""
    program = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    image = tl.program_id(1).to(tl.int64)
    label, begin, end = find_block(offsets + image * offsets_stride, num_labels, height * width, program, PIXELS)
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    row, is_row = rows_of(part * ROWS, image, heads, latents, first, count, LATENTS, ROWS)
    there = inside[:, None] & is_row[None, :]
    x = pixel_pointers(x, image, pixel, width, image_stride, row_stride, column_stride, FLAT)
    if grad_x is not None:
        grad_x = pixel_pointers(
            grad_x, image, pixel, width, grad_image_stride, grad_row_stride, grad_column_stride, FLAT
        )

    logits = by_position(row_bias, col_bias, row, pixel, height, width, there)
    gradients = by_position(grad_row_mass, grad_col_mass, row, pixel, height, width, there)
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        known = inside[:, None] & (channel < channels)[None, :]
        features = load_channels(x, channel_stride, channel, known)
        table = load_rows(queries, row, is_row, channel, channels)
        logits = tl.dot(features, tl.trans(table), logits, input_precision=PRECISION)
        if grad_pooled is not None:
            table = load_rows(grad_pooled, row, is_row, channel, channels)
            gradients = tl.dot(features, tl.trans(table), gradients, input_precision=PRECISION)
    weights = tl.exp(logits - tl.load(lse + row, mask=is_row, other=0.0)[None, :])
    weights = tl.where(there, weights, 0.0)
    gradients = tl.where(there, weights * (gradients - tl.load(delta + row, mask=is_row, other=0.0)[None, :]), 0.0)

    first += (program - label).to(tl.int64) * max_latents
    partial, _ = rows_of(part * ROWS, image, heads, partial_rows, first, count, LATENTS, ROWS)
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        known = inside[:, None] & (channel < channels)[None, :]
        features = load_channels(x, channel_stride, channel, known)
        if partial_queries is not None:
            sums = tl.dot(tl.trans(gradients), features, input_precision=PRECISION)
            store_rows(partial_queries, sums, partial, is_row, channel, channels)
        if grad_x is not None:
            result = _of_moments(features, offset, factor, mean, image, channel, channels)
            table = load_rows(queries, row, is_row, channel, channels)
            result = tl.dot(gradients, table, result, input_precision=PRECISION)
            if grad_pooled is not None:
                table = load_rows(grad_pooled, row, is_row, channel, channels)
                result = tl.dot(weights, table, result, input_precision=PRECISION)
            store_channels(grad_x, grad_channel_stride, channel, result, known)
    slot, _ = rows_of(part * ROWS, image, heads, max_latents, 0, count, LATENTS, ROWS)
    if all_weights is not None:
        store_values(all_weights, weights, slot, is_row, pixel, inside, height * width)
    if all_gradients is not None:
        store_values(all_gradients, gradients, slot, is_row, pixel, inside, height * width)
        store_labels(labels, label, image, pixel, inside & (part == 0), height * width)


@triton.jit
def _pool_backward_features(
    x, queries, grad_pooled, offset, factor, mean, cu_latents, offsets, order, all_weights, all_gradients, grad_x,
    image_stride, channel_stride, row_stride, column_stride,
    grad_image_stride, grad_channel_stride, grad_row_stride, grad_column_stride,
    cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, height, width,
    channels: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    LATENTS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of a block, where its rows have several parts."""
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    label, begin, end = find_block(
        offsets + image * offsets_stride, num_labels, height * width, tl.program_id(0) // channel_blocks, PIXELS
    )
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    x = pixel_pointers(x, image, pixel, width, image_stride, row_stride, column_stride, FLAT)
    grad_x = pixel_pointers(grad_x, image, pixel, width, grad_image_stride, grad_row_stride, grad_column_stride, FLAT)
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    known = inside[:, None] & (channel < channels)[None, :]
    features = load_channels(x, channel_stride, channel, known)
    result = _of_moments(features, offset, factor, mean, image, channel, channels)
    for first_row in tl.range(0, heads * LATENTS, ROWS, disable_licm=True):
        row, is_row = rows_of(first_row, image, heads, latents, first, count, LATENTS, ROWS)
        slot, _ = rows_of(first_row, image, heads, max_latents, 0, count, LATENTS, ROWS)
        gradients = load_values(all_gradients, slot, is_row, pixel, inside, height * width)
        table = load_rows(queries, row, is_row, channel, channels)
        result = tl.dot(gradients, table, result, input_precision=PRECISION)
        if grad_pooled is not None:
            weights = load_values(all_weights, slot, is_row, pixel, inside, height * width)
            table = load_rows(grad_pooled, row, is_row, channel, channels)
            result = tl.dot(weights, table, result, input_precision=PRECISION)
    store_channels(grad_x, grad_channel_stride, channel, result, known)
