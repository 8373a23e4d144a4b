"""The strongest FlexAttention that we could find for pixels that attend to the latents of their label.

FlexAttention skips blocks, so the pixels are sorted by label first: then a block of pixels meets the
latents of one label, or at a border of a few that follow one another. What makes it fast:

* The block mask is derived from the sorted labels, in time linear in the number of blocks of pixels.
  ``create_block_mask`` would evaluate all pairs, which takes longer than the attention.
* Blocks of few keys, since a label owns few latents. Latents need no padding: a block of keys may
  span several labels, and the mask inside the block sorts them out. Blocks of one label, where they
  exist, are declared full, so that no mask is evaluated.
* The block sizes were chosen by measurement (:data:`BLOCKS`); the benchmark measures the choice again
  beside its rivals (:data:`RIVAL_BLOCKS`), so a better one would show.
* Sorting and unsorting copy rows with ``index_select``, four times as fast as indexing.

Unsorting the result gives what the dense formulation gives; every benchmark checks that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Pixels and latents in a block; on AVX-512, 8 latents per label.
BLOCKS = {torch.float32: (128, 16), torch.bfloat16: (128, 8)}
RIVAL_BLOCKS = ((64, 8), (128, 8), (256, 8), (64, 16), (128, 16), (256, 16), (128, 32))


def sort_pixels(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N) in ascending order, the pixel of each, and for each pixel where it went."""
    sorted_labels, order = labels.sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    return sorted_labels, order, places


def label_block_mask(sorted_labels: Tensor, num_labels: int, latents: int, block_size: tuple[int, int]) -> BlockMask:
    """Which blocks of latents each block of sorted pixels needs."""
    pixels, keys = sorted_labels.shape[0], num_labels * latents
    query_block, key_block = block_size
    starts = torch.arange(0, pixels, query_block)
    first_label = sorted_labels[starts]
    last_label = sorted_labels[(starts + query_block - 1).clamp_(max=pixels - 1)]
    first_block = first_label * latents // key_block
    count = ((last_label + 1) * latents - 1) // key_block - first_block + 1
    key_blocks = -(-keys // key_block)
    indices = first_block[:, None] + torch.arange(key_blocks, dtype=torch.int32)
    indices = indices.clamp_(max=key_blocks - 1)[None, None]
    masked_count, full_count, full_indices = count[None, None], None, None
    if latents % key_block == 0:
        full_count = torch.where(first_label == last_label, count, 0)[None, None]
        masked_count = masked_count - full_count
        full_indices = indices.clone()  # the generated C++ does not compile when it gets one tensor twice

    def same_label(batch: Tensor, head: Tensor, pixel: Tensor, latent: Tensor) -> Tensor:
        return sorted_labels[pixel] == latent // latents

    return BlockMask.from_kv_blocks(
        masked_count,
        indices,
        full_count,
        full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=same_label,
        seq_lengths=(pixels, keys),
        compute_q_blocks=False,  # only backward reads them
    )


def why_no_backward() -> str | None:
    """The reason why this PyTorch has no FlexAttention backward on the CPU, or None if it has one."""
    query = torch.randn(1, 1, 16, 16, requires_grad=True)
    try:
        torch.autograd.grad(flex_attention(query, query, query).sum(), query)
    except NotImplementedError:
        return "no backward on CPU"
    return None
