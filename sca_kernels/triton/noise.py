"""A standard normal number for each element of a feature map; ``sca_kernels/reference/noise.py`` says which."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _box_muller(first, second):
    """Two normal numbers from two words of 32 bits."""
    radius = tl.sqrt(-2.0 * tl.log(((first >> 8) + 1).to(tl.float32) * (1.0 / 16777216.0)))
    # A quarter turn at most is left to sine and cosine: the whole angle, rounded to float32, would be too coarse.
    turns = (second >> 8).to(tl.int32)
    quarter = (turns + 2097152) >> 22
    angle = (turns - (quarter << 22)).to(tl.float32) * (1.5707963267948966 / 4194304.0)
    # Their series; what there is for any angle would need local memory.
    square = angle * angle
    sine = square * (-1.0 / 5040.0 + square * (1.0 / 362880.0))
    sine = angle + angle * square * (-1.0 / 6.0 + square * (1.0 / 120.0) + square * sine)
    cosine = square * (-1.0 / 720.0 + square * (1.0 / 40320.0 - square * (1.0 / 3628800.0)))
    cosine = 1.0 - square * (0.5 - square * (1.0 / 24.0 + cosine))
    swapped = (quarter & 1) == 1
    x = tl.where(swapped, -sine, cosine)
    y = tl.where(swapped, cosine, sine)
    sign = tl.where((quarter & 2) == 2, -1.0, 1.0)
    return radius * (sign * x), radius * (sign * y)


@triton.jit
def noise_tile(seed, image, channel_block, pixels, BLOCK_CHANNELS: tl.constexpr):
    """Normal numbers for BLOCK_CHANNELS channels, a multiple of 4, from ``channel_block * BLOCK_CHANNELS`` on.

    One counter serves four channels, so it is drawn for a quarter of the tile.
    """
    GROUPS: tl.constexpr = BLOCK_CHANNELS // 4
    group = channel_block * GROUPS + tl.arange(0, GROUPS)
    zeros = tl.zeros((GROUPS, pixels.shape[0]), tl.int32)
    pixel, group, image = zeros + pixels.to(tl.int32)[None, :], zeros + group[:, None], zeros + image.to(tl.int32)
    first, second, third, fourth = tl.philox(seed, pixel, group, image, zeros)
    a, b = _box_muller(first, second)
    c, d = _box_muller(third, fourth)
    normals = tl.join(tl.join(a, b), tl.join(c, d))  # group, pixel, low bit and high bit of the channel in its group
    return tl.reshape(tl.permute(normals, (0, 3, 2, 1)), (BLOCK_CHANNELS, pixels.shape[0]))
