"""What kernels share that work on blocks of pixels of one label: how they find them, and how sums are added.

A program takes up to PIXELS pixels that follow one another in a plan's order and have one label. So it meets the
latents of that label alone and loops over no labels, whatever the map. Programs are numbered so that their number
depends on sizes alone: block i of label l is program ``offsets[l] // PIXELS + l + i``, which no other block is, since
label l ends before program ``offsets[l + 1] // PIXELS + l + 1``. A program whose number no block has finds nothing.

What a block adds to the sums of a latent lies in a partial row of its own: for latent j that is row
``(offsets[l] // PIXELS + i) * max_latents + j``. It is used once as well: from block to block of a label it grows by
``max_latents``, from label to label by the latents. A second kernel adds a latent's partial rows in their order.

Tiles are (pixels, channels), (pixels, rows) or (rows, channels). The rows are the latents of a label in all heads: the
narrow side of the matrix products. Where there are more than 32 they are taken in parts, since a thread holds registers
for each row of a product's operand: by programs of their own where the rows have nothing to do with one another, else
one after another. Only what needs a whole softmax at once holds all rows, with heads and latents padded to powers of
two, and the more rows the fewer pixels.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch import Configuration, configuration, launch

_MOST_ROWS = 256
_MOST_ROWS_OF_A_PART = 32
_LARGE_MAP = 64 * 64


class LabelBlocks:
    """How a call is cut into blocks.

    Attributes:
        heads, latents, max_latents, num_labels, pixels: of the call.
        all_rows: padded heads and padded latents of a label, by the names that kernels have for them.
        rows: padded latents and the rows of a part, likewise.
        parts: how many parts the rows have.
        padded: how many ``all_rows`` are.
        cut: the configuration of the kernel.
        programs: blocks of each image.
        partial_rows: for each image and head.
    """

    def __init__(self, kernel: str, x: Tensor, heads: int, latents: int, max_latents: int, num_labels: int) -> None:
        padded_heads = triton.next_power_of_2(max(heads, 1))
        padded_latents = max(triton.next_power_of_2(max(max_latents, 1)), 16 // padded_heads)
        rows = padded_heads * padded_latents
        if rows > _MOST_ROWS:
            raise ValueError(
                f"layout: the backend 'triton' expects at most {_MOST_ROWS} latents of a label in all heads, each "
                f"rounded up to a power of two, got {max_latents} in {heads} heads"
            )
        self.heads, self.latents, self.max_latents, self.num_labels = heads, latents, max_latents, num_labels
        self.pixels = x.shape[2] * x.shape[3]
        self.all_rows = {"HEADS": padded_heads, "LATENTS": padded_latents}
        self.rows = {"LATENTS": padded_latents, "ROWS": min(rows, _MOST_ROWS_OF_A_PART)}
        self.parts = max(triton.cdiv(heads * padded_latents, self.rows["ROWS"]), 1)
        self.padded = rows
        size_class = f"{rows} rows"
        if rows == 16:
            size_class = "large map" if self.pixels >= _LARGE_MAP else "small map"
        self.cut: Configuration = configuration(kernel, size_class, x.device, x.dtype)
        self.programs = self.pixels // self.cut["PIXELS"] + num_labels + 1
        self.partial_rows = (self.pixels // self.cut["PIXELS"] + 1) * max_latents + latents


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def image_stride(grouping: Tensor) -> int:
    """From image to image in ``cu_latents``, offsets or order; 0 where one serves all."""
    return grouping.stride(0) if grouping.dim() == 2 and grouping.shape[0] > 1 else 0


def add_partial_rows(blocks: LabelBlocks, partial: Tensor, cu_latents: Tensor, offsets: Tensor) -> Tensor:
    """The sums (..., B, H, m, width) of partial rows (..., B, H, partial rows, width); zero for absent labels."""
    *groups, _, width = partial.shape
    total = partial.new_empty((*groups, blocks.latents, width))
    cut = configuration("add_partial_rows", "any", partial.device, partial.dtype)
    launch(
        _add_partial_rows,
        (blocks.latents, triton.cdiv(width, cut["WIDTH"]), math.prod(groups)),
        partial, total, cu_latents, offsets,
        image_stride(cu_latents), image_stride(offsets),
        groups[-2], blocks.heads, blocks.latents, blocks.max_latents, blocks.num_labels, blocks.partial_rows, width,
        PIXELS=blocks.cut["PIXELS"], **cut.options,
    )  # fmt: skip
    return total


@triton.jit
def last_label_until(counts, num_labels, value, scale, PIXELS: tl.constexpr):
    """The last label l with counts[l] // PIXELS + scale * l <= value, by bisection; num_labels for none."""
    low = 0
    high = num_labels
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(counts + middle) // PIXELS + scale * middle <= value:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def find_block(offsets, num_labels, pixels, program, PIXELS: tl.constexpr):
    """The label of a program (num_labels for none), and where its block begins and ends in the plan's order."""
    label = last_label_until(offsets, num_labels, program, 1, PIXELS)
    begin = tl.load(offsets + label)
    end = tl.load(offsets + label + 1, mask=label < num_labels, other=pixels)
    begin += (program - begin // PIXELS - label) * PIXELS
    return label, begin, tl.minimum(begin + PIXELS, end)


@triton.jit
def pixels_of_block(order, begin, end, PIXELS: tl.constexpr):
    """The pixels of a block, and which of the tile's lines they fill: the first ones."""
    position = begin + tl.arange(0, PIXELS)
    return tl.load(order + position, mask=position < end, other=0), position < end


@triton.jit
def latents_of(cu_latents, num_labels, label):
    """The first latent of a label, and how many it has: none without a label."""
    first = tl.load(cu_latents + label)
    return first, tl.load(cu_latents + label + 1, mask=label < num_labels, other=first) - first


@triton.jit
def blocks_of(cu_latents, offsets, num_labels, latent, PIXELS: tl.constexpr):
    """The first block of a latent's label, in units of max_latents partial rows, and how many blocks it has."""
    label = last_label_until(cu_latents, num_labels, latent, 0, 1)
    begin = tl.load(offsets + label)
    end = tl.load(offsets + label + 1, mask=label < num_labels, other=begin)
    return (begin // PIXELS).to(tl.int64), tl.cdiv(end - begin, PIXELS)


@triton.jit
def rows_of(start, image, heads, latents, first, count, LATENTS: tl.constexpr, ROWS: tl.constexpr):
    """For ROWS rows of a label from ``start`` on: their rows in tables (B, H, latents), and whether they are there."""
    row = start + tl.arange(0, ROWS)
    head = row // LATENTS
    latent = row % LATENTS
    return (image * heads + head) * latents + first + latent, (head < heads) & (latent < count)


@triton.jit
def load_rows(table, row, is_row, channel, channels):
    """Rows of a table as a tile (rows, channels), zero where there are none."""
    mask = is_row[:, None] & (channel < channels)[None, :]
    return tl.load(table + row[:, None] * channels + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(table, values, row, is_row, channel, channels):
    mask = is_row[:, None] & (channel < channels)[None, :]
    tl.store(table + row[:, None] * channels + channel[None, :], values, mask=mask)


@triton.jit
def by_position(row_table, col_table, row, pixel, height, width, mask):
    """What tables (B, H, m, height) and (B, H, m, width), or None, have for each pixel and row of a tile, added up."""
    values = tl.zeros(mask.shape, tl.float32)
    if row_table is not None:
        values += tl.load(row_table + (pixel // width)[:, None] + row[None, :] * height, mask=mask, other=0.0)
    if col_table is not None:
        values += tl.load(col_table + (pixel % width)[:, None] + row[None, :] * width, mask=mask, other=0.0)
    return values


@triton.jit
def _add_partial_rows(
    partial, total, cu_latents, offsets,
    cu_latents_stride, offsets_stride,
    batch, heads, latents, max_latents, num_labels, partial_rows, width,
    PIXELS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    group = tl.program_id(2).to(tl.int64)
    image = group // heads % batch
    first, count = blocks_of(
        cu_latents + image * cu_latents_stride, offsets + image * offsets_stride, num_labels, latent, PIXELS
    )
    partial += (group * partial_rows + first * max_latents + latent) * width
    total_row = tl.zeros([WIDTH], tl.float32)
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        mask = (slot < count)[:, None] & (column < width)[None, :]
        places = slot.to(tl.int64)[:, None] * max_latents * width + column[None, :]
        total_row += tl.sum(tl.load(partial + places, mask=mask, other=0.0), 0)
    tl.store(total + (group * latents + latent) * width + column, total_row, mask=column < width)
