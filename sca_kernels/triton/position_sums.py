"""Sums over the rows and the columns of an image of what the latents of a pixel's label have there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .label_blocks import LabelBlocks, image_stride, latents_of
from .launch import configuration, launch


def add_up_positions(
    values: Tensor,
    labels: Tensor,
    blocks: LabelBlocks,
    cu_latents: Tensor,
    along: str,
    sums: Tensor,
    lse: Tensor | None = None,
) -> Tensor:
    """Adds up the values along each row or each column of the image.

    Args:
        values, labels: as ``position_values`` describes them.
        along: "rows" or "columns".
        sums: (B, H, m, height) or (B, H, m, width). Where a line has no pixel of a latent's label nothing is written.
        lse: (B, H, m), to add up exp(value - lse) instead of the values.

    Returns:
        sums.
    """
    batch, heads, latents, lines = sums.shape
    elements = blocks.pixels // max(lines, 1)
    steps = (elements, 1) if along == "rows" else (1, lines)
    cut = configuration("add_up_lines", along, values.device, values.dtype)
    launch(
        _add_up_lines,
        (triton.cdiv(lines, cut["LINES"]), triton.cdiv(blocks.max_latents, cut["SLOTS"]), batch * heads),
        values, labels, cu_latents, lse, sums,
        image_stride(cu_latents), heads, latents, blocks.max_latents, blocks.num_labels, lines, elements, *steps,
        **cut.options,
    )  # fmt: skip
    return sums


@triton.jit
def _next_label(labels, after, line, lines, elements, line_step, element_step, ELEMENTS: tl.constexpr):
    """The smallest label greater than ``after`` in a block of lines; 2^31 - 1 if there is none."""
    smallest = 2**31 - 1
    for begin in range(0, elements, ELEMENTS):
        element = begin + tl.arange(0, ELEMENTS)
        inside = (line < lines)[:, None] & (element < elements)[None, :]
        place = line.to(tl.int64)[:, None] * line_step + element.to(tl.int64)[None, :] * element_step
        label = tl.load(labels + place, mask=inside, other=2**31 - 1)
        smallest = tl.minimum(smallest, tl.min(tl.where(label > after, label, 2**31 - 1)))
    return smallest


@triton.jit
def _add_up_lines(
    values, labels, cu_latents, lse, sums,
    cu_latents_stride, heads, latents, max_latents, num_labels, lines, elements, line_step, element_step,
    SLOTS: tl.constexpr, LINES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)  # among the latents of a label
    group = tl.program_id(2).to(tl.int64)
    image = group // heads
    labels += image * lines * elements
    slots = values + (group * max_latents + slot)[:, None, None] * lines * elements
    label = _next_label(labels, -1, line, lines, elements, line_step, element_step, ELEMENTS)
    while label < num_labels:
        first, count = latents_of(cu_latents + image * cu_latents_stride, num_labels, label)
        row = group * latents + first + slot
        total = tl.zeros([SLOTS, LINES], tl.float32)
        if lse is not None:
            shift = tl.load(lse + row, mask=slot < count, other=0.0)[:, None, None]
        for begin in range(0, elements, ELEMENTS):
            element = begin + tl.arange(0, ELEMENTS)
            inside = (line < lines)[:, None] & (element < elements)[None, :]
            place = line.to(tl.int64)[:, None] * line_step + element.to(tl.int64)[None, :] * element_step
            inside &= tl.load(labels + place, mask=inside, other=num_labels) == label
            there = (slot < count)[:, None, None] & inside[None, :, :]
            value = tl.load(slots + place[None, :, :], mask=there, other=0.0)
            if lse is not None:
                value = tl.where(there, tl.exp(value - shift), 0.0)
            total += tl.sum(value, 2)
        mask = (slot < count)[:, None] & (line < lines)[None, :]
        tl.store(sums + row[:, None] * lines + line[None, :], total, mask=mask)
        label = _next_label(labels, label, line, lines, elements, line_step, element_step, ELEMENTS)
