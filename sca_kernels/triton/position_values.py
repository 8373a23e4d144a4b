"""A number for each pixel and latent of its label, in memory: logits, weights, or the gradients of logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .label_blocks import LabelBlocks


def position_values(x: Tensor, blocks: LabelBlocks) -> tuple[Tensor, Tensor]:
    """Memory for one number for each pixel and latent of its label, (B, H, max_latents, n), and for its label (B, n).

    Both are in the order of the image. Where a pixel has no label, its label is num_labels. In kernels a row of the
    former is a slot; ``rows_of`` tells the slots of rows too, of ``max_latents`` latents instead of ``latents``.
    """
    batch = x.shape[0]
    return (
        x.new_empty((batch, blocks.heads, blocks.max_latents, blocks.pixels), dtype=torch.float32),
        x.new_empty((batch, blocks.pixels), dtype=torch.int32),
    )


@triton.jit
def load_values(values, slot, is_row, pixel, inside, pixels):
    """A tile (pixels, rows), zero where there is nothing."""
    mask = inside[:, None] & is_row[None, :]
    return tl.load(values + pixel[:, None] + slot[None, :] * pixels, mask=mask, other=0.0)


@triton.jit
def store_values(values, tile, slot, is_row, pixel, inside, pixels):
    mask = inside[:, None] & is_row[None, :]
    tl.store(values + pixel[:, None] + slot[None, :] * pixels, tile, mask=mask)


@triton.jit
def store_labels(labels, label, image, pixel, inside, pixels):
    """Says which label the pixels of a block have."""
    tl.store(labels + image * pixels + pixel, tl.zeros_like(pixel) + label, mask=inside)
