"""A standard normal number for each element of a feature map, from a counter: the same wherever it is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four random words of 32 bits per counter.

    Words are int64 tensors with values in [0, 2^32), of shapes that broadcast.
    """
    first, second, third, fourth = counter
    first_key, second_key = key
    for step in range(_ROUNDS):
        first_high, first_low = _multiply(first, _MULTIPLIERS[0])
        third_high, third_low = _multiply(third, _MULTIPLIERS[1])
        first, second, third, fourth = (
            third_high ^ second ^ ((first_key + step * _KEY_STEPS[0]) & _WORD),
            third_low,
            first_high ^ fourth ^ ((second_key + step * _KEY_STEPS[1]) & _WORD),
            first_low,
        )
    return first, second, third, fourth


def per_element_noise(seed: Tensor, batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers (batch, channels, height, width), by Philox4x32-10 and Box-Muller.

    The key is (low word, high word) of the seed, the counter (row * width + column, channel // 4, image, 0). With the
    words r0 to r3 of a counter, u(r) = ((r >> 8) + 1) / 2^24 and v(r) = (r >> 8) / 2^24, channels 4q and 4q + 1 get
    sqrt(-2 ln u(r0)) times the cosine and the sine of 2 pi v(r1), channels 4q + 2 and 4q + 3 the same of r2 and r3.

    Args:
        seed: int64, one element; every 64 bit value is a seed of its own.
    """
    device = seed.device
    seed = seed.reshape(())
    groups = -(-channels // 4)
    pixel = torch.arange(height * width, device=device).view(1, 1, height, width)
    group = torch.arange(groups, device=device).view(1, groups, 1, 1)
    image = torch.arange(batch, device=device).view(batch, 1, 1, 1)
    words = philox((pixel, group, image, torch.zeros_like(image)), (seed & _WORD, (seed >> 32) & _WORD))
    normals = torch.stack((*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])), 2)
    return normals.view(batch, 4 * groups, height, width)[:, :channels].to(dtype)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product, by halves, which keeps clear of the sign of int64."""
    upper = (word >> 16) * multiplier
    lower = (word & 0xFFFF) * multiplier
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _WORD


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius = (-2 * (((first >> 8) + 1).double() / 2**24).log()).sqrt()
    angle = (second >> 8).double() * (2 * math.pi / 2**24)
    return radius * angle.cos(), radius * angle.sin()
