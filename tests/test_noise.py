"""The normal number of each element: Philox4x32-10 and Box-Muller, in the reference and in the kernels."""

from __future__ import annotations

import math

import pytest
import torch
from instances import MEMORY
from torch import Tensor

from sca_kernels import backend, instance_modulate
from sca_kernels.reference.noise import per_element_noise, philox

# The lowest and the highest words among them; every one of 64 bits is a seed.
SEEDS = (0, 1, -1, 2**32, 2**63 - 1, -(2**63), 12345678901234)

# Of the authors' known-answer tests (Random123, kat_vectors): counter, key, result.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("known", KNOWN_ANSWERS)
def test_known_answers(known):
    counter, key, expected = KNOWN_ANSWERS[known]
    words = philox(tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key))
    assert tuple(word.item() for word in words) == expected


def philox_in_integers(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Written once more, in Python's integers, so that its words can be told one by one."""
    first, second, third, fourth = counter
    for step in range(10):
        low_key, high_key = ((key[i] + step * (0x9E3779B9, 0xBB67AE85)[i]) % 2**32 for i in range(2))
        one, other = 0xD2511F53 * first, 0xCD9E8D57 * third
        first, second = (other >> 32) ^ second ^ low_key, other % 2**32
        third, fourth = (one >> 32) ^ fourth ^ high_key, one % 2**32
    return first, second, third, fourth


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_of_some_elements(seed):
    """Which element takes which words, and what it makes of them."""
    batch, channels, height, width = 3, 6, 4, 5
    numbers = per_element_noise(torch.tensor(seed), batch, channels, height, width, torch.float64)
    assert numbers.shape == (batch, channels, height, width)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for image, channel, row, column in ((0, 0, 0, 0), (2, 5, 3, 4), (1, 2, 0, 1), (0, 3, 2, 0), (2, 4, 1, 3)):
        words = philox_in_integers((row * width + column, channel // 4, image, 0), key)
        first, second = (word >> 8 for word in (words[2:] if channel % 4 >= 2 else words[:2]))
        radius, angle = math.sqrt(-2 * math.log((first + 1) / 2**24)), 2 * math.pi * second / 2**24
        expected = radius * (math.sin(angle) if channel % 2 else math.cos(angle))
        assert numbers[image, channel, row, column].item() == pytest.approx(expected, abs=1e-13)


def made(seed: int, shape: tuple[int, ...], dtype: torch.dtype, memory: str) -> Tensor:
    """What the kernels make, with nothing done to it."""
    wide = torch.promote_types(dtype, torch.float32)
    with backend("cpu"):
        return instance_modulate(
            MEMORY[memory](torch.zeros(shape, dtype=dtype)),
            stats=(torch.zeros((), dtype=wide), torch.ones((), dtype=wide)),
            noise="per_element", noise_seed=torch.tensor(seed), negative_slope=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("channels", [1, 3, 4, 6, 16, 37, 130])
@pytest.mark.parametrize("memory", MEMORY)
def test_kernels_make_the_numbers_of_the_reference(capability, seed, channels, memory):
    shape = (2, channels, 20, 33)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        expected = per_element_noise(torch.tensor(seed), *shape, torch.float64)
        assert (made(seed, shape, dtype, memory) - expected).abs().max().item() <= tolerance


@pytest.mark.parametrize("memory", MEMORY)
def test_numbers_are_accurate_where_they_are_rare(capability, memory):
    """A million: some from each end of the logarithm, in maps of several tiles and chunks."""
    shape = (1, 20, 230, 240)
    expected = per_element_noise(torch.tensor(11), *shape, torch.float64)
    assert expected.abs().max().item() > 4.8 and expected.abs().min().item() < 1e-5
    assert (made(11, shape, torch.float32, memory) - expected).abs().max().item() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_a_16_bit_map_are_rounded_once(capability, dtype):
    shape = (2, 5, 7, 9)
    expected = per_element_noise(torch.tensor(7), *shape, torch.float32)
    error = (made(7, shape, dtype, "channels first").float() - expected).abs()
    assert (error <= expected.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-6).all()


def test_numbers_are_normal_and_independent():
    """Moments, tails, and correlations between neighbours in every direction, within five standard errors."""
    numbers = per_element_noise(torch.tensor(5), 4, 16, 64, 64, torch.float64)
    count = numbers.numel()
    flat = numbers.flatten()
    # of the powers: their expectation, and the variance of their mean times the count
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(flat.pow(power).mean().item() - mean) < 5 * (variance / count) ** 0.5
    for limit in (0.5, 1, 2, 3):
        share = math.erfc(limit / 2**0.5)
        found = (flat.abs() > limit).double().mean().item()
        assert abs(found - share) < 5 * (share / count) ** 0.5
    other = per_element_noise(torch.tensor(6), 4, 16, 64, 64, torch.float64)
    pairs = [(numbers, other)]
    for dimension in range(4):
        for step in (1, 2, 3):
            length = numbers.shape[dimension] - step
            pairs.append((numbers.narrow(dimension, 0, length), numbers.narrow(dimension, step, length)))
    for one, another in pairs:
        assert abs((one * another).mean().item()) < 5 / one.numel() ** 0.5
    assert flat.unique().numel() > 0.97 * count


def test_a_part_of_the_channels_or_images_has_the_same_numbers():
    """The number of an element depends on its place, not on how many there are."""
    seed = torch.tensor(3)
    all_of_them = per_element_noise(seed, 3, 9, 5, 7, torch.float64)
    assert torch.equal(per_element_noise(seed, 2, 6, 5, 7, torch.float64), all_of_them[:2, :6])
    assert torch.equal(per_element_noise(seed, 3, 9, 4, 7, torch.float64), all_of_them[:, :, :4])


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)], ids=str)
def test_no_numbers(native, shape):
    assert per_element_noise(torch.tensor(1), *shape, torch.float32).shape == shape
    for memory in MEMORY:
        assert made(1, shape, torch.float32, memory).shape == shape


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_seed_is_drawn_from_the_generator_of_pytorch(native, name):
    x = torch.randn(1, 5, 6, 7)

    def draw(seed: Tensor | None = None) -> Tensor:
        with backend(name):
            return instance_modulate(x, noise="per_element", noise_seed=seed)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(second, first)
    seeds = [draw(torch.tensor(seed).view(shape)) for seed, shape in ((4, ()), (4, (1,)), (5, (1, 1)))]
    assert torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])


def test_backends_draw_the_same_seed(native):
    x = torch.randn(1, 5, 6, 7)
    results = []
    for name in ("cpu", "reference"):
        torch.manual_seed(3)
        with backend(name):
            results.append(instance_modulate(x, noise="per_element"))
    torch.testing.assert_close(*results)
