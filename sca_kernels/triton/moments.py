"""Means and deviations of channels, and sums over them, in two ordered stages: partial results, then their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import memory_order, pixel_offsets, strides_of, tile_pointers
from .launch import configuration, launch


def channel_statistics(x: Tensor, mean: Tensor, rstd: Tensor, *, unbiased: bool, eps: float) -> None:
    """Writes the mean of each channel of each image and 1 / sqrt(variance + eps), each (B, C), contiguous.

    Deviations are taken from a number close to the mean, and partial results are merged in double precision by Chan's
    formula: a mean that is large beside the deviations costs nothing.
    """
    batch, channels, height, width = x.shape
    pixels = height * width
    config = configuration("channel_moments", memory_order(x), x.device, x.dtype)
    chunks = triton.cdiv(pixels, config["TILES"] * config["BLOCK_PIXELS"])
    partial = torch.empty((2, chunks, batch * channels), dtype=torch.float64, device=x.device)
    flat, [strides] = strides_of(x)
    channel_blocks = triton.cdiv(channels, config["BLOCK_CHANNELS"])
    launch(
        _channel_moments,
        (batch * channel_blocks * chunks,),
        *(x, *strides, partial, batch, channels, width, pixels, chunks, channel_blocks),
        FLAT=flat,
        **config.options,
    )
    merge = configuration("merge_moments", "any", x.device, x.dtype)
    launch(
        _merge_moments,
        (triton.cdiv(batch * channels, merge["BLOCK_ROWS"]),),
        *(partial, mean, rstd, batch * channels, pixels, chunks, eps),
        CHUNK=config["TILES"] * config["BLOCK_PIXELS"],
        UNBIASED=unbiased,
        **merge.options,
    )


def merge_sums(partial: Tensor) -> Tensor:
    """The sums over chunks (k, rows) in float32, of partial sums (k, chunks, rows) in float32."""
    sums, chunks, rows = partial.shape
    merged = torch.empty((sums, rows), dtype=torch.float32, device=partial.device)
    config = configuration("merge_sums", "any", partial.device, partial.dtype)
    grid = (triton.cdiv(rows, config["BLOCK_ROWS"]), sums)
    launch(_merge_sums, grid, partial, merged, rows, chunks, **config.options)
    return merged


@triton.jit
def _channel_moments(
    x, image_stride, channel_stride, row_stride, column_stride, partial,
    batch, channel_count, width, pixel_count, chunk_count, channel_blocks,
    FLAT: tl.constexpr, TILES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    chunk = program % chunk_count
    block = program // chunk_count % channel_blocks
    image = program // chunk_count // channel_blocks
    channels = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    here = channels < channel_count
    mean = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    squares = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for tile in range(TILES):
        begin = (tl.cast(chunk, tl.int64) * TILES + tile) * BLOCK_PIXELS
        if begin < pixel_count:
            pixels = begin + tl.arange(0, BLOCK_PIXELS)
            mask = here[:, None] & (pixels < pixel_count)[None, :]
            pointers = tile_pointers(
                x, image, channels, pixels, width, image_stride, channel_stride, row_stride, column_stride, FLAT
            )
            values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            # Any pixel's value makes a channel without deviations exact; a second step corrects one that lies far off.
            origin = x + image.to(tl.int64) * image_stride + channels.to(tl.int64) * channel_stride
            origin += pixel_offsets(begin, width, row_stride, column_stride, FLAT)
            some_value = tl.load(origin, mask=here, other=0.0).to(tl.float32)
            count = tl.cast(tl.minimum(pixel_count - begin, BLOCK_PIXELS), tl.float32)
            near = some_value + tl.sum(tl.where(mask, values - some_value[:, None], 0.0), 1) / count
            deviations = tl.where(mask, values - near[:, None], 0.0)
            rest = tl.sum(deviations, 1) / count
            deviations = tl.where(mask, deviations - rest[:, None], 0.0)
            tile_squares = tl.sum(deviations * deviations, 1).to(tl.float64)
            step = near.to(tl.float64) + rest.to(tl.float64) - mean
            before = tl.cast(tile * BLOCK_PIXELS, tl.float64)
            share = tl.cast(count, tl.float64) / (before + count)
            mean += step * share
            squares += tile_squares + step * step * (before * share)
    rows = tl.cast(batch, tl.int64) * channel_count
    target = partial + chunk * rows + image.to(tl.int64) * channel_count + channels
    tl.store(target, mean, mask=here)
    tl.store(target + chunk_count * rows, squares, mask=here)


@triton.jit
def _merge_moments(
    partial, mean_target, rstd_target, row_count, pixel_count, chunk_count, eps,
    CHUNK: tl.constexpr, UNBIASED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = rows < row_count
    mean = tl.zeros((BLOCK_ROWS,), tl.float64)
    squares = tl.zeros((BLOCK_ROWS,), tl.float64)
    for chunk in range(chunk_count):
        source = partial + tl.cast(chunk, tl.int64) * row_count + rows
        chunk_mean = tl.load(source, mask=here, other=0.0)
        chunk_squares = tl.load(source + tl.cast(chunk_count, tl.int64) * row_count, mask=here, other=0.0)
        begin = tl.cast(chunk, tl.int64) * CHUNK
        before = tl.cast(begin, tl.float64)
        count = tl.cast(tl.minimum(pixel_count - begin, CHUNK), tl.float64)
        share = count / (before + count)
        step = chunk_mean - mean
        mean += step * share
        squares += chunk_squares + step * step * (before * share)
    freedom = tl.maximum(pixel_count - 1, 1) if UNBIASED else tl.maximum(pixel_count, 1)
    rstd = 1.0 / tl.sqrt(squares / tl.cast(freedom, tl.float64) + eps)
    tl.store(mean_target + rows, mean, mask=here)
    tl.store(rstd_target + rows, rstd, mask=here)


@triton.jit
def _merge_sums(partial, merged, row_count, chunk_count, BLOCK_ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = rows < row_count
    which = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS,), tl.float64)
    for chunk in range(chunk_count):
        source = partial + (which * chunk_count + chunk) * row_count + rows
        total += tl.load(source, mask=here, other=0.0).to(tl.float64)
    tl.store(merged + which * row_count + rows, total.to(tl.float32), mask=here)
