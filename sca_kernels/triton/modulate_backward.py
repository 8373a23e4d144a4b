"""The kernels of semantic_modulate, backward: a pass for sums, and one for the gradients of keys and features."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import load_channels, pixel_pointers, store_channels
from .label_blocks import find_block, latents_of, load_rows, pixels_of_block, rows_of, store_rows
from .modulate_forward import attention_weights, modulate_tile, of_channels
from .position_sums import store_labels, value_places

# How many sums over the pixels of a block there are for each channel, by the gradients dy of y: of dy n, dy,
# gamma dy n, gamma dy, noise dy.
SUMS = tl.constexpr(5)


@triton.jit
def modulate_backward_sums(
    x, grad_out, keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
    mean, rstd, noise_strength, noise, noise_seed, cu_latents, offsets, order,
    partial_scale, partial_shift, partial_bias, kinds, block_sums, all_weights, all_gradients, labels,
    x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
    out_image_stride, out_channel_stride, out_row_stride, out_column_stride,
    noise_image_stride, noise_row_stride, noise_column_stride, cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, partial_rows, height, width, negative_slope,
    channels: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, LATENTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Leaves the weights and the gradients of the logits, where they are wanted, for the other kernel."""
    program = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    block = image * tl.num_programs(0) + program
    label, begin, end = find_block(offsets + image * offsets_stride, num_labels, height * width, program, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    tl.store(kinds + block, tl.where(begin >= end, 0, tl.where(count == 0, 2, 1)))
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    row, is_row = rows_of(image, heads, latents, first, count, HEADS, LATENTS)
    x = pixel_pointers(x, image, pixel, width, x_image_stride, x_row_stride, x_column_stride, FLAT)
    grad_out = pixel_pointers(grad_out, image, pixel, width, out_image_stride, out_row_stride, out_column_stride, FLAT)
    if noise is not None:
        noise = pixel_pointers(
            noise, image, pixel, width, noise_image_stride, noise_row_stride, noise_column_stride, False
        )
    weights = attention_weights(
        x, x_channel_stride, keys, key_bias, row_bias, col_bias, row, is_row, pixel, inside, height, width,
        channels, PRECISION, HEADS, LATENTS, PIXELS, CHANNELS,
    )  # fmt: skip

    first += (program - label).to(tl.int64) * max_latents
    partial, _ = rows_of(image, heads, partial_rows, first, count, HEADS, LATENTS)
    gradients = tl.zeros([PIXELS, HEADS * LATENTS], tl.float32)
    # What could be computed before the loop would hold registers that its body needs.
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = channel < channels
        known = inside[:, None] & is_channel[None, :]
        features = load_channels(x, x_channel_stride, channel, known)
        normalised, gamma, numbers, result = modulate_tile(
            features, weights, scale, shift, scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd,
            noise_strength, noise, noise_seed, row, is_row, count == 0, image, start, channel, pixel, inside, channels,
            ADD_ONE, PRECISION, CHANNELS,
        )  # fmt: skip
        grad_beta = load_channels(grad_out, out_channel_stride, channel, known)
        grad_beta = tl.where(result > 0.0, grad_beta, grad_beta * negative_slope)
        grad_gamma = grad_beta * normalised
        table = load_rows(scale, row, is_row, channel, channels)
        gradients = tl.dot(grad_gamma, tl.trans(table), gradients, input_precision=PRECISION)
        table = load_rows(shift, row, is_row, channel, channels)
        gradients = tl.dot(grad_beta, tl.trans(table), gradients, input_precision=PRECISION)
        if partial_scale is not None:
            sums = tl.dot(tl.trans(weights), grad_gamma, input_precision=PRECISION)
            store_rows(partial_scale, sums, partial, is_row, channel, channels)
        if partial_shift is not None:
            sums = tl.dot(tl.trans(weights), grad_beta, input_precision=PRECISION)
            store_rows(partial_shift, sums, partial, is_row, channel, channels)
        target = block_sums + block * SUMS * channels + channel
        tl.store(target, tl.sum(grad_gamma, 0), mask=is_channel)
        tl.store(target + channels, tl.sum(grad_beta, 0), mask=is_channel)
        tl.store(target + 2 * channels, tl.sum(gamma * grad_gamma, 0), mask=is_channel)
        tl.store(target + 3 * channels, tl.sum(gamma * grad_beta, 0), mask=is_channel)
        tl.store(target + 4 * channels, tl.sum(numbers * grad_beta, 0), mask=is_channel)
    by_head = tl.reshape(weights * gradients, (PIXELS, HEADS, LATENTS))
    inner = tl.broadcast_to(tl.sum(by_head, 2)[:, :, None], (PIXELS, HEADS, LATENTS))
    gradients = weights * (gradients - tl.reshape(inner, (PIXELS, HEADS * LATENTS)))
    if partial_bias is not None:
        tl.store(partial_bias + partial, tl.sum(gradients, 0), mask=is_row)
    there = inside[:, None] & is_row[None, :]
    places = value_places(image, pixel, heads, max_latents, height * width, HEADS, LATENTS)
    if all_weights is not None:
        tl.store(all_weights + places, weights, mask=there)
    if all_gradients is not None:
        tl.store(all_gradients + places, gradients, mask=there)
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
    noise, noise_seed, cu_latents, offsets, order, all_weights, all_gradients, sums, grad_x, partial_keys,
    x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
    out_image_stride, out_channel_stride, out_row_stride, out_column_stride,
    grad_image_stride, grad_channel_stride, grad_row_stride, grad_column_stride,
    noise_image_stride, noise_row_stride, noise_column_stride, cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, partial_rows, height, width, negative_slope,
    channels: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, LATENTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One part of the channels of a block. ``sums``, of ``add_block_sums``, are None where statistics are given."""
    parts = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    image = tl.program_id(1).to(tl.int64)
    label, begin, end = find_block(offsets + image * offsets_stride, num_labels, height * width, program, PIXELS)
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    row, is_row = rows_of(image, heads, latents, first, count, HEADS, LATENTS)
    x = pixel_pointers(x, image, pixel, width, x_image_stride, x_row_stride, x_column_stride, FLAT)
    channel = part * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    known = inside[:, None] & is_channel[None, :]
    features = load_channels(x, x_channel_stride, channel, known)
    there = inside[:, None] & is_row[None, :]
    places = value_places(image, pixel, heads, max_latents, height * width, HEADS, LATENTS)
    gradients = tl.load(all_gradients + places, mask=there, other=0.0)
    if partial_keys is not None:
        first += (program - label).to(tl.int64) * max_latents
        partial, _ = rows_of(image, heads, partial_rows, first, count, HEADS, LATENTS)
        of_keys = tl.dot(tl.trans(gradients), features, input_precision=PRECISION)
        store_rows(partial_keys, of_keys, partial, is_row, channel, channels)
    if grad_x is not None:
        if noise is not None:
            noise = pixel_pointers(
                noise, image, pixel, width, noise_image_stride, noise_row_stride, noise_column_stride, False
            )
        weights = tl.load(all_weights + places, mask=there, other=0.0)
        normalised, gamma, _, result = modulate_tile(
            features, weights, scale, shift, scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd,
            noise_strength, noise, noise_seed, row, is_row, count == 0, image, part * CHANNELS, channel, pixel, inside,
            channels, ADD_ONE, PRECISION, CHANNELS,
        )  # fmt: skip
        grad_out = pixel_pointers(
            grad_out, image, pixel, width, out_image_stride, out_row_stride, out_column_stride, FLAT
        )
        total = load_channels(grad_out, out_channel_stride, channel, known)
        total = gamma * tl.where(result > 0.0, total, total * negative_slope)
        place = image * channels + channel
        if sums is not None:
            rows = tl.num_programs(1).to(tl.int64) * channels
            scaled = of_channels(sums + 2 * rows, place, is_channel)
            shifted = of_channels(sums + 3 * rows, place, is_channel)
            total -= (shifted + normalised * scaled) / (height * width)
        table = load_rows(keys, row, is_row, channel, channels)
        total = tl.dot(gradients, table, total * of_channels(rstd, place, is_channel), input_precision=PRECISION)
        grad_x = pixel_pointers(
            grad_x, image, pixel, width, grad_image_stride, grad_row_stride, grad_column_stride, FLAT
        )
        store_channels(grad_x, grad_channel_stride, channel, total, known)
