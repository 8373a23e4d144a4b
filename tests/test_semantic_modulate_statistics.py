"""The statistics that semantic_modulate computes or is given, and the tables beside them."""

from __future__ import annotations

import itertools

import pytest
import torch
from folded import (
    ALL_OPTIONS,
    DTYPES,
    MEMORY,
    apply,
    arranged,
    assert_accurate,
    assert_close,
    assert_matches_reference,
    away_from_kink,
    expect,
    modulate_problem,
    solve,
)
from tokens import TOLERANCE, label_map, random_map

import sca_kernels
from sca_kernels import LatentLayout

any_memory = pytest.mark.parametrize("memory", MEMORY)


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (2, 1), (1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tables_that_are_broadcast(native, shape, backend):
    """Their gradients have their own shape."""
    problem = modulate_problem(channels=5, options=ALL_OPTIONS, noise="per_pixel", dtype=torch.float64)
    names = ALL_OPTIONS[3:]
    few = {name: problem.tensors[name].flatten()[: torch.Size(shape).numel()].view(shape).abs() for name in names}
    many = {name: table.expand(2, 5).contiguous() for name, table in few.items()}
    actual, expected = (solve(problem.with_tensors(**tables), backend) for tables in (few, many))
    torch.testing.assert_close(actual["out"], expected["out"])
    for name in names:
        assert actual[f"grad_{name}"].shape == shape
        torch.testing.assert_close(actual[f"grad_{name}"], expected[f"grad_{name}"].sum_to_size(shape))


@pytest.mark.parametrize("pair", list(itertools.product([(), (5,)], [(2, 1), (2, 5)])), ids=str)
def test_statistics_of_two_shapes(native, pair):
    problem = modulate_problem(channels=5, options=("mean", "rstd"), dtype=torch.float64)
    mean, rstd = (torch.rand(shape, dtype=torch.float64) + 0.5 for shape in pair)
    assert_matches_reference(away_from_kink(problem.with_tensors(mean=mean, rstd=rstd)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_given_statistics_that_are_those_of_x(native, backend):
    """Computed outside, with their gradients: the result and the gradient of x are as without."""
    problem = modulate_problem(channels=5, dtype=torch.float64)
    expected = solve(problem, backend)
    x = problem.tensors["x"].clone().requires_grad_()
    variance, mean = torch.var_mean(x, (2, 3), correction=0)
    with sca_kernels.backend(backend):
        out = apply(problem, {**problem.tensors, "x": x, "mean": mean, "rstd": (variance + 1e-5).rsqrt()})["out"]
    (gradient,) = torch.autograd.grad(out, x, problem.gradients["out"])
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(gradient, expected["grad_x"])


def test_given_rstd_of_zero(capability):
    """A channel that is switched off: everything but the gradient of what switches it is as ever."""
    problem = modulate_problem(channels=5, options=("scale_bias", "shift_bias", "mean", "rstd"), dtype=torch.float64)
    rstd = problem.tensors["rstd"].clone()
    rstd[:, ::2] = 0
    problem = away_from_kink(problem.with_tensors(rstd=rstd))
    actual, expected = solve(problem, "cpu"), expect(problem)
    for results in (actual, expected):
        results["grad_rstd"] = results["grad_rstd"][:, 1::2]
    assert_close(actual, expected, TOLERANCE[torch.float64])


def test_given_statistics_are_left_alone(native):
    problem = modulate_problem(channels=5, options=("mean", "rstd"))
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    solve(problem, "cpu")
    assert all(torch.equal(problem.tensors[name], tensor) for name, tensor in before.items())


@any_memory
def test_large_mean(capability, memory):
    """A mean 10,000 times the deviation from it, in float32.

    x is given as rounded, so its mean is what rounding can spoil: half a unit in the last place of 10,000 is 0.0005,
    and all normalised numbers of the channel are off by that, times rstd. A mean, or a variance, from sums of x or of
    its square would be off by far more.
    """
    channels, (height, width) = 5, (64, 40)
    problem = modulate_problem(
        random_map(2, height, width, 3), LatentLayout((2, 1, 0)), channels=channels, options=(), negative_slope=1.0
    )
    offset = torch.tensor([1e4, -1e4, 0.0, 1e4, 3.0]).view(1, channels, 1, 1)
    zeros = {name: torch.zeros_like(problem.tensors[name]) for name in ("keys", "scale", "shift")}
    problem = arranged(problem.with_tensors(x=problem.tensors["x"] + offset, **zeros), memory)
    actual, expected = solve(problem, "cpu"), expect(problem)
    mean = problem.tensors["x"].double().mean((2, 3), keepdim=True)
    half_unit = torch.exp2(mean.abs().log2().floor() - 24)
    assert ((actual["out"] - expected["out"]).abs() <= 1.1 * half_unit + 1e-5).all()
    # dx = rstd (g - mean(g) - n mean(g n)): the error of n enters times means of random numbers.
    assert (actual["grad_x"] - expected["grad_x"]).abs().max() <= 1e-4


@any_memory
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels(capability, memory, dtype):
    """Normalised to zero exactly, although rstd is as large as it gets."""
    constants = torch.tensor([0.0, 0.1, -1e3, 1e-3, 3.0]).to(dtype)
    problem = modulate_problem(random_map(2, 20, 33, 3), LatentLayout((2, 1, 0)), channels=5, dtype=dtype)
    x = constants.view(1, 5, 1, 1).expand(2, 5, 20, 33).contiguous()
    zeros = {name: torch.zeros_like(problem.tensors[name]) for name in ("shift", "shift_bias")}
    problem = arranged(problem.with_tensors(x=x, **zeros), memory)
    assert not solve(problem, "cpu", wanted=())["out"].any()
    mixed = away_from_kink(problem.with_tensors(x=torch.cat((x[:, :2], torch.randn_like(x)[:, 2:]), 1)))
    assert_accurate(mixed, solve(mixed, "cpu"), expect(mixed))


@any_memory
def test_single_pixel(capability, memory):
    """It is its own mean: the result is beta, and x has a gradient through the attention alone."""
    problem = arranged(modulate_problem(label_map([[1]], 2), LatentLayout((2, 3)), batch=1, channels=5), memory)
    actual, expected = solve(problem, "cpu"), expect(problem)
    for name in ("out", "grad_scale", "grad_shift", "grad_scale_bias", "grad_shift_bias"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    # Two terms of this size cancel.
    size = 1e-5**-0.5 * problem.gradients["out"].abs().max() * 10
    assert (actual["grad_x"] - expected["grad_x"]).abs().max() <= size * 1e-6
