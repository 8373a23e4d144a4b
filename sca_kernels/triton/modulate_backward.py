"""The kernels of semantic_modulate, backward: a pass for sums, and one for the gradients of keys and features."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import load_channels, pixel_pointers, store_channels
from .label_blocks import find_block, latents_of, load_rows, pixels_of_block, rows_of, store_rows
from .modulate_forward import attention_weights, modulate_tile, of_channels, scale_and_shift
from .position_values import load_values, store_labels, store_values

# How many sums over the pixels of a block there are for each channel, by the gradients dy of y: of dy n, dy,
# gamma dy n, gamma dy, noise dy.
SUMS = tl.constexpr(5)


@triton.jit
def modulate_backward_sums(
    x, grad_out, keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
    mean, rstd, noise_strength, noise, noise_seed, cu_latents, offsets, order,
    partial_bias, kinds, block_sums, all_weights, all_gradients, labels,
    x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
    out_image_stride, out_channel_stride, out_row_stride, out_column_stride,
    noise_image_stride, noise_row_stride, noise_column_stride, cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, partial_rows, height, width, negative_slope,
    channels: tl.constexpr, STORED: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Leaves the gradients of logits for the other kernel, and the weights, unless they are there already (STORED)."""
    program = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    block = image * tl.num_programs(0) + program
    label, begin, end = find_block(offsets + image * offsets_stride, num_labels, height * width, program, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    tl.store(kinds + block, tl.where(begin >= end, 0, tl.where(count == 0, 2, 1)))
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    row, is_row = rows_of(0, image, heads, latents, first, count, LATENTS, HEADS * LATENTS)
    x = pixel_pointers(x, image, pixel, width, x_image_stride, x_row_stride, x_column_stride, FLAT)
    grad_out = pixel_pointers(grad_out, image, pixel, width, out_image_stride, out_row_stride, out_column_stride, FLAT)
    if noise is not None:
        noise = pixel_pointers(
            noise, image, pixel, width, noise_image_stride, noise_row_stride, noise_column_stride, False
        )
    slot, _ = rows_of(0, image, heads, max_latents, 0, count, LATENTS, HEADS * LATENTS)
    weights = None
    if not STORED:
        weights = attention_weights(
            x, x_channel_stride, keys, key_bias, row_bias, col_bias, row, is_row, pixel, inside, height, width,
            channels, PRECISION, HEADS, LATENTS, PIXELS, CHANNELS,
        )  # fmt: skip
        store_values(all_weights, weights, slot, is_row, pixel, inside, height * width)

    gradients = tl.zeros([PIXELS, HEADS * LATENTS], tl.float32)
    # What could be computed before the loop would hold registers that its body needs.
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = channel < channels
        known = inside[:, None] & is_channel[None, :]
        features = load_channels(x, x_channel_stride, channel, known)
        gamma, beta = scale_and_shift(
            weights, all_weights, scale, shift, image, heads, latents, max_latents, first, count, pixel, inside,
            height * width, channel, channels, PRECISION, HEADS, LATENTS, ROWS,
        )  # fmt: skip
        normalised, gamma, numbers, result = modulate_tile(
            features, gamma, beta, scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd, noise_strength,
            noise, noise_seed, count == 0, image, start, channel, pixel, inside, channels, ADD_ONE, CHANNELS,
        )  # fmt: skip
        grad_beta = load_channels(grad_out, out_channel_stride, channel, known)
        grad_beta = tl.where(result > 0.0, grad_beta, grad_beta * negative_slope)
        grad_gamma = grad_beta * normalised
        target = block_sums + block * SUMS * channels + channel
        tl.store(target, tl.sum(grad_gamma, 0), mask=is_channel)
        tl.store(target + channels, tl.sum(grad_beta, 0), mask=is_channel)
        tl.store(target + 2 * channels, tl.sum(gamma * grad_gamma, 0), mask=is_channel)
        tl.store(target + 3 * channels, tl.sum(gamma * grad_beta, 0), mask=is_channel)
        tl.store(target + 4 * channels, tl.sum(numbers * grad_beta, 0), mask=is_channel)
        table = load_rows(scale, row, is_row, channel, channels)
        gradients = tl.dot(grad_gamma, tl.trans(table), gradients, input_precision=PRECISION)
        table = load_rows(shift, row, is_row, channel, channels)
        gradients = tl.dot(grad_beta, tl.trans(table), gradients, input_precision=PRECISION)
    if STORED:
        weights = load_values(all_weights, slot, is_row, pixel, inside, height * width)
    by_head = tl.reshape(weights * gradients, (PIXELS, HEADS, LATENTS))
    inner = tl.broadcast_to(tl.sum(by_head, 2)[:, :, None], (PIXELS, HEADS, LATENTS))
    gradients = weights * (gradients - tl.reshape(inner, (PIXELS, HEADS * LATENTS)))
    if partial_bias is not None:
        first += (program - label).to(tl.int64) * max_latents
        partial, _ = rows_of(0, image, heads, partial_rows, first, count, LATENTS, HEADS * LATENTS)
        tl.store(partial_bias + partial, tl.sum(gradients, 0), mask=is_row)
    store_values(all_gradients, gradients, slot, is_row, pixel, inside, height * width)
    store_labels(labels, label, image, pixel, inside, height * width)


@triton.jit
def add_block_sums(kinds, block_sums, sums, blocks, channels, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr):
    """Adds up the sums of all blocks, and of those without latents, in their order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    of_all = tl.zeros([CHANNELS], tl.float32)
    of_empty = tl.zeros([CHANNELS], tl.float32)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        kind = tl.load(kinds + image * blocks + block, mask=block < blocks, other=0)
        places = ((image * blocks + block) * SUMS + which)[:, None] * channels + channel[None, :]
        known = (kind > 0)[:, None] & (channel < channels)[None, :]
        of_block = tl.load(block_sums + places, mask=known, other=0.0)
        of_all += tl.sum(of_block, 0)
        of_empty += tl.sum(tl.where((kind == 2)[:, None], of_block, 0.0), 0)
    place = (which * tl.num_programs(1) + image) * channels + channel
    tl.store(sums + place, of_all, mask=channel < channels)
    place += SUMS * tl.num_programs(1) * channels
    tl.store(sums + place, of_empty, mask=channel < channels)


@triton.jit
def modulate_backward_features(
    x, grad_out, keys, scale, shift, scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd, noise_strength,
    noise, noise_seed, cu_latents, offsets, order, all_weights, all_gradients, sums,
    grad_x, partial_keys, partial_scale, partial_shift,
    x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
    out_image_stride, out_channel_stride, out_row_stride, out_column_stride,
    grad_image_stride, grad_channel_stride, grad_row_stride, grad_column_stride,
    noise_image_stride, noise_row_stride, noise_column_stride, cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, partial_rows, height, width, negative_slope,
    channels: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    LATENTS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of a block. ``sums``, of ``add_block_sums``, are None where statistics are given."""
    channel_blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0) // channel_blocks
    start = tl.program_id(0) % channel_blocks * CHANNELS
    image = tl.program_id(1).to(tl.int64)
    label, begin, end = find_block(offsets + image * offsets_stride, num_labels, height * width, program, PIXELS)
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    x = pixel_pointers(x, image, pixel, width, x_image_stride, x_row_stride, x_column_stride, FLAT)
    grad_out = pixel_pointers(grad_out, image, pixel, width, out_image_stride, out_row_stride, out_column_stride, FLAT)
    if noise is not None:
        noise = pixel_pointers(
            noise, image, pixel, width, noise_image_stride, noise_row_stride, noise_column_stride, False
        )
    channel = start + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    known = inside[:, None] & is_channel[None, :]
    features = load_channels(x, x_channel_stride, channel, known)
    gamma, beta = scale_and_shift(
        None, all_weights, scale, shift, image, heads, latents, max_latents, first, count, pixel, inside,
        height * width, channel, channels, PRECISION, 1, LATENTS, ROWS,
    )  # fmt: skip
    normalised, gamma, _numbers, result = modulate_tile(
        features, gamma, beta, scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd, noise_strength,
        noise, noise_seed, count == 0, image, start, channel, pixel, inside, channels, ADD_ONE, CHANNELS,
    )  # fmt: skip
    grad_beta = load_channels(grad_out, out_channel_stride, channel, known)
    grad_beta = tl.where(result > 0.0, grad_beta, grad_beta * negative_slope)
    grad_gamma = grad_beta * normalised
    place = image * channels + channel
    total = gamma * grad_beta
    if sums is not None:
        images = tl.num_programs(1).to(tl.int64) * channels
        scaled = of_channels(sums + 2 * images, place, is_channel)
        shifted = of_channels(sums + 3 * images, place, is_channel)
        total -= (shifted + normalised * scaled) / (height * width)
    total *= of_channels(rstd, place, is_channel)
    first_partial = first + (program - label).to(tl.int64) * max_latents
    for first_row in tl.range(0, heads * LATENTS, ROWS, disable_licm=True):
        row, is_row = rows_of(first_row, image, heads, latents, first, count, LATENTS, ROWS)
        partial, _ = rows_of(first_row, image, heads, partial_rows, first_partial, count, LATENTS, ROWS)
        slot, _ = rows_of(first_row, image, heads, max_latents, 0, count, LATENTS, ROWS)
        if partial_scale is not None or partial_shift is not None:
            weights = tl.trans(load_values(all_weights, slot, is_row, pixel, inside, height * width))
            if partial_scale is not None:
                of_scale = tl.dot(weights, grad_gamma, input_precision=PRECISION)
                store_rows(partial_scale, of_scale, partial, is_row, channel, channels)
            if partial_shift is not None:
                of_shift = tl.dot(weights, grad_beta, input_precision=PRECISION)
                store_rows(partial_shift, of_shift, partial, is_row, channel, channels)
        if partial_keys is not None or grad_x is not None:
            gradients = load_values(all_gradients, slot, is_row, pixel, inside, height * width)
            if partial_keys is not None:
                of_keys = tl.dot(tl.trans(gradients), features, input_precision=PRECISION)
                store_rows(partial_keys, of_keys, partial, is_row, channel, channels)
            if grad_x is not None:
                table = load_rows(keys, row, is_row, channel, channels)
                total = tl.dot(gradients, table, total, input_precision=PRECISION)
    if grad_x is not None:
        grad_x = pixel_pointers(
            grad_x, image, pixel, width, grad_image_stride, grad_row_stride, grad_column_stride, FLAT
        )
        store_channels(grad_x, grad_channel_stride, channel, total, known)
