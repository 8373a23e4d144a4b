"""The kernels of semantic_modulate, forward, and what the backward pass computes once more."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import load_channels, pixel_pointers, store_channels
from .label_blocks import by_position, find_block, latents_of, load_rows, pixels_of_block, rows_of
from .noise import noise_tile
from .position_values import load_values, store_values


@triton.jit
def of_channels(table, place, is_channel):
    """A column of a table (B, C) that may be None, beside a tile."""
    values = tl.zeros(place.shape, tl.float32)
    if table is not None:
        values += tl.load(table + place, mask=is_channel, other=0.0)
    return values[None, :]


@triton.jit
def attention_weights(
    x, channel_stride, keys, key_bias, row_bias, col_bias, row, is_row, pixel, inside, height, width,
    channels: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, LATENTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The weights (pixels, rows): softmax over the latents, in each head; zero where there are none."""
    there = inside[:, None] & is_row[None, :]
    logits = by_position(row_bias, col_bias, row, pixel, height, width, there)
    if key_bias is not None:
        logits += tl.load(key_bias + row, mask=is_row, other=0.0)[None, :]
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        features = load_channels(x, channel_stride, channel, inside[:, None] & (channel < channels)[None, :])
        table = load_rows(keys, row, is_row, channel, channels)
        logits = tl.dot(features, tl.trans(table), logits, input_precision=PRECISION)
    logits = tl.reshape(tl.where(there, logits, float("-inf")), (PIXELS, HEADS, LATENTS))
    largest = tl.max(logits, 2)
    weights = tl.exp(logits - tl.where(largest > float("-inf"), largest, 0.0)[:, :, None])
    total = tl.sum(weights, 2)
    weights = weights / tl.where(total == 0.0, 1.0, total)[:, :, None]
    return tl.reshape(weights, (PIXELS, HEADS * LATENTS))


@triton.jit
def scale_and_shift(
    weights, all_weights, scale, shift, image, heads, latents, max_latents, first, count, pixel, inside, pixels,
    channel, channels: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over latents (pixels, channels), by weights (pixels, rows) or, if these are None, those in memory."""
    gamma = tl.zeros((pixel.shape[0], channel.shape[0]), tl.float32)
    beta = tl.zeros((pixel.shape[0], channel.shape[0]), tl.float32)
    if weights is not None:
        row, is_row = rows_of(0, image, heads, latents, first, count, LATENTS, HEADS * LATENTS)
        gamma = tl.dot(weights, load_rows(scale, row, is_row, channel, channels), gamma, input_precision=PRECISION)
        beta = tl.dot(weights, load_rows(shift, row, is_row, channel, channels), beta, input_precision=PRECISION)
    else:
        for first_row in tl.range(0, heads * LATENTS, ROWS, disable_licm=True):
            row, is_row = rows_of(first_row, image, heads, latents, first, count, LATENTS, ROWS)
            slot, _ = rows_of(first_row, image, heads, max_latents, 0, count, LATENTS, ROWS)
            part = load_values(all_weights, slot, is_row, pixel, inside, pixels)
            gamma = tl.dot(part, load_rows(scale, row, is_row, channel, channels), gamma, input_precision=PRECISION)
            beta = tl.dot(part, load_rows(shift, row, is_row, channel, channels), beta, input_precision=PRECISION)
    return gamma, beta


@triton.jit
def modulate_tile(
    features, gamma, beta, scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd, noise_strength,
    noise, noise_seed, is_empty, image, start, channel, pixel, inside, channels: tl.constexpr,
    ADD_ONE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The normalised features of a tile, gamma, noise, and the result before its activation.

    Of gamma and beta the sums over latents are given.
    """
    place = image * channels + channel
    is_channel = channel < channels
    normalised = (features - of_channels(mean, place, is_channel)) * of_channels(rstd, place, is_channel)
    gamma += of_channels(scale_bias, place, is_channel) + of_channels(empty_scale, place, is_channel & is_empty)
    if ADD_ONE:
        gamma += 1.0
    beta += of_channels(shift_bias, place, is_channel) + of_channels(empty_shift, place, is_channel & is_empty)
    numbers = tl.zeros_like(features)
    if noise is not None:
        numbers += tl.load(noise, mask=inside, other=0.0)[:, None]
    if noise_seed is not None:
        numbers += tl.trans(noise_tile(tl.load(noise_seed), image, start // CHANNELS, pixel, CHANNELS))
    strength = 1.0
    if noise_strength is not None:
        strength = of_channels(noise_strength, place, is_channel)
    return normalised, gamma, numbers, gamma * normalised + beta + strength * numbers


@triton.jit
def modulate_weights(
    x, keys, key_bias, row_bias, col_bias, cu_latents, offsets, order, all_weights,
    image_stride, channel_stride, row_stride, column_stride, cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, height, width,
    channels: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, LATENTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Only the weights, where they are too many for the program that modulates."""
    image = tl.program_id(1).to(tl.int64)
    label, begin, end = find_block(
        offsets + image * offsets_stride, num_labels, height * width, tl.program_id(0), PIXELS
    )
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    row, is_row = rows_of(0, image, heads, latents, first, count, LATENTS, HEADS * LATENTS)
    x = pixel_pointers(x, image, pixel, width, image_stride, row_stride, column_stride, FLAT)
    weights = attention_weights(
        x, channel_stride, keys, key_bias, row_bias, col_bias, row, is_row, pixel, inside, height, width,
        channels, PRECISION, HEADS, LATENTS, PIXELS, CHANNELS,
    )  # fmt: skip
    slot, _ = rows_of(0, image, heads, max_latents, 0, count, LATENTS, HEADS * LATENTS)
    store_values(all_weights, weights, slot, is_row, pixel, inside, height * width)


@triton.jit
def modulate_blocks(
    x, out, keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
    mean, rstd, noise_strength, noise, noise_seed, cu_latents, offsets, order, all_weights,
    x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
    out_image_stride, out_channel_stride, out_row_stride, out_column_stride,
    noise_image_stride, noise_row_stride, noise_column_stride, cu_latents_stride, offsets_stride, order_stride,
    heads, latents, max_latents, num_labels, height, width, negative_slope,
    channels: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``all_weights`` are those of ``modulate_weights``, or None if the program is to compute them."""
    image = tl.program_id(1).to(tl.int64)
    label, begin, end = find_block(
        offsets + image * offsets_stride, num_labels, height * width, tl.program_id(0), PIXELS
    )
    if begin >= end:
        return
    pixel, inside = pixels_of_block(order + image * order_stride, begin, end, PIXELS)
    first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
    x = pixel_pointers(x, image, pixel, width, x_image_stride, x_row_stride, x_column_stride, FLAT)
    out = pixel_pointers(out, image, pixel, width, out_image_stride, out_row_stride, out_column_stride, FLAT)
    if noise is not None:
        noise = pixel_pointers(
            noise, image, pixel, width, noise_image_stride, noise_row_stride, noise_column_stride, False
        )
    weights = None
    if all_weights is None:
        row, is_row = rows_of(0, image, heads, latents, first, count, LATENTS, HEADS * LATENTS)
        weights = attention_weights(
            x, x_channel_stride, keys, key_bias, row_bias, col_bias, row, is_row, pixel, inside, height, width,
            channels, PRECISION, HEADS, LATENTS, PIXELS, CHANNELS,
        )  # fmt: skip
    # What could be computed before the loop would hold registers that its body needs.
    for start in tl.range(0, channels, CHANNELS, disable_licm=True):
        channel = start + tl.arange(0, CHANNELS)
        known = inside[:, None] & (channel < channels)[None, :]
        features = load_channels(x, x_channel_stride, channel, known)
        gamma, beta = scale_and_shift(
            weights, all_weights, scale, shift, image, heads, latents, max_latents, first, count, pixel, inside,
            height * width, channel, channels, PRECISION, HEADS, LATENTS, ROWS,
        )  # fmt: skip
        _, _, _, result = modulate_tile(
            features, gamma, beta, scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd, noise_strength,
            noise, noise_seed, count == 0, image, start, channel, pixel, inside, channels, ADD_ONE, CHANNELS,
        )  # fmt: skip
        result = tl.where(result > 0.0, result, result * negative_slope)
        store_channels(out, out_channel_stride, channel, result, known)
