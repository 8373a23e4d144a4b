"""The noise of semantic_modulate: values given for pixels, and numbers made for every element from a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folded import channels_last, modulate_problem, solve
from tokens import random_map
from torch import Tensor

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, semantic_modulate
from sca_kernels.reference.noise import per_element_noise

either_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])

# The lowest and the highest words among them; every one of 64 bits is a seed.
SEEDS = (0, 1, -1, 2**32, 2**63 - 1, -(2**63), 12345678901234)


def made(seed: int | Tensor, batch: int, channels: int, labels: LabelMap, dtype: torch.dtype, memory: Any) -> Tensor:
    """What the kernels make, with nothing done to it."""
    layout = LatentLayout((1, 0))
    wide = torch.promote_types(dtype, torch.float32)
    x = memory(torch.ones(batch, channels, labels.height, labels.width, dtype=dtype))
    rows = torch.zeros(batch, 1, 1, channels, dtype=wide)
    zero = torch.zeros((), dtype=wide)
    with sca_kernels.backend("cpu"):
        return semantic_modulate(
            x, rows, rows, rows, layout, labels, add_one=False, stats=(zero, zero), negative_slope=1.0,
            noise="per_element", noise_seed=torch.as_tensor(seed),
        )  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("channels", [1, 3, 4, 6, 16, 37])
@pytest.mark.parametrize("memory", [torch.clone, channels_last])
def test_numbers_are_those_of_the_reference(capability, seed, channels, memory):
    """Within 1e-6, in whatever order and by whatever blocks of pixels they are made."""
    labels = random_map(1, 20, 33, 2)
    for dtype in (torch.float32, torch.float64):
        actual = made(seed, 3, channels, labels, dtype, memory)
        expected = per_element_noise(torch.tensor(seed), 3, channels, 20, 33, dtype)
        assert (actual - expected).abs().max().item() <= 1e-6


@pytest.mark.parametrize("memory", [torch.clone, channels_last])
def test_rare_numbers(capability, memory):
    """Many enough to have some of more than 4.5 standard deviations, and small ones: logarithms of all sizes."""
    labels = random_map(1, 64, 40, 2)
    actual = made(7, 2, 64, labels, torch.float32, memory)
    expected = per_element_noise(torch.tensor(7), 2, 64, 64, 40, torch.float64)
    assert expected.abs().max() > 4.5 and expected.abs().min() < 1e-4
    assert (actual - expected).abs().max().item() <= 1e-6
    assert abs(actual.mean().item()) < 5 / actual.numel() ** 0.5
    assert abs(actual.std().item() - 1) < 5 / actual.numel() ** 0.5
    # A number for each element, none twice.
    assert actual.unique().numel() > 0.97 * actual.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_a_16_bit_map_are_rounded_once(capability, dtype):
    labels = random_map(1, 7, 9, 2)
    actual = made(7, 2, 5, labels, dtype, torch.clone)
    expected = per_element_noise(torch.tensor(7), 2, 5, 7, 9, torch.float32)
    assert actual.dtype == dtype
    assert ((actual.float() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-6).all()


def draw(backend: str, **settings: Any) -> Tensor:
    problem = modulate_problem(channels=5, options=(), noise="per_element", **settings)
    problem = problem.with_settings(noise_seed=None) if "noise_seed" not in settings else problem
    out = solve(problem, backend, wanted=())["out"]
    assert out is not None
    return out


@either_backend
def test_a_seed_is_drawn_from_the_generator_of_pytorch(native, backend):
    torch.manual_seed(3)
    first, second = draw(backend), draw(backend)
    torch.manual_seed(3)
    again = draw(backend)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_backends_draw_the_same_seed(native):
    torch.manual_seed(3)
    first = draw("cpu")
    torch.manual_seed(3)
    torch.testing.assert_close(draw("reference"), first)


@either_backend
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_shapes_of_a_seed(native, backend, shape):
    """The numbers depend on its value alone."""
    problem = modulate_problem(channels=5, options=(), noise="per_element")
    seed = problem.settings["noise_seed"]
    expected = solve(problem, backend)
    actual = solve(problem.with_settings(noise_seed=seed.reshape(shape)), backend)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    other = solve(problem.with_settings(noise_seed=seed + 1), backend)
    assert not torch.equal(other["out"], expected["out"])


def test_images_have_numbers_of_their_own(capability):
    labels = random_map(1, 7, 9, 2)
    numbers = made(7, 2, 5, labels, torch.float32, torch.clone)
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(numbers[:1], made(7, 1, 5, labels, torch.float32, torch.clone))


@either_backend
@pytest.mark.parametrize(
    "shape", [(), (9,), (7, 9), (7, 1), (1, 1, 7, 9), (2, 1, 1, 1), (2, 1, 1, 9), (2, 1, 7, 9)], ids=str
)
def test_shapes_of_noise(native, backend, shape):
    """Whatever is broadcast is read where it lies."""
    problem = modulate_problem(channels=5, options=("noise_strength",), noise="per_pixel")
    noise = torch.randn(shape)
    actual = solve(problem.with_settings(noise=noise), backend)
    expected = solve(problem.with_settings(noise=noise.expand(2, 1, 7, 9).contiguous()), backend)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


@either_backend
@pytest.mark.parametrize("noise_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_noise_of_another_type(native, backend, noise_type, dtype):
    """Converted to the type that is computed in."""
    problem = modulate_problem(channels=5, dtype=dtype, options=(), noise="per_pixel")
    wide = torch.promote_types(dtype, torch.float32)
    noise = problem.settings["noise"].to(noise_type)
    actual = solve(problem.with_settings(noise=noise), backend)
    expected = solve(problem.with_settings(noise=noise.to(wide)), backend)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@either_backend
@pytest.mark.parametrize("noise", ["per_pixel", "per_element"])
def test_strength(native, backend, noise):
    """Without one it is 1; at 0 the noise is as if it were not there, and still has a gradient of its strength."""
    problem = modulate_problem(channels=5, options=("noise_strength",), noise=noise, dtype=torch.float64)
    strength = problem.tensors["noise_strength"]
    ones = solve(problem.with_tensors(noise_strength=torch.ones_like(strength)), backend)
    none = solve(problem.without_tensors("noise_strength"), backend)
    zeros = solve(problem.with_tensors(noise_strength=torch.zeros_like(strength)), backend)
    without = solve(modulate_problem(channels=5, options=(), dtype=torch.float64), backend)
    torch.testing.assert_close(none["out"], ones["out"])
    torch.testing.assert_close(zeros["out"], without["out"])
    assert zeros["grad_noise_strength"].all()


@either_backend
def test_noise_that_requires_a_gradient_in_inference(native, backend):
    """Only where one would be lost it is refused."""
    problem = modulate_problem(channels=5, options=(), noise="per_pixel")
    noise = problem.settings["noise"].clone().requires_grad_()
    with torch.no_grad():
        actual = solve(problem.with_settings(noise=noise), backend, wanted=())
    assert torch.equal(actual["out"], solve(problem, backend, wanted=())["out"])
