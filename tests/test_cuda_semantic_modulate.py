"""semantic_modulate in CUDA C++ against the reference: results and every gradient, by the host or on a GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from folded import (
    ALL_OPTIONS,
    ARRANGEMENTS,
    EDGES,
    LABELS,
    MAPS,
    MODULATE_OPTIONS,
    Problem,
    arranged,
    assert_accurate,
    assert_close,
    assert_same_bits,
    away_from_kink,
    expect,
    modulate_problem,
    solve,
)
from tokens import random_map
from torch import Tensor

from sca_kernels import LatentLayout

pytestmark = pytest.mark.cuda

memory = pytest.mark.parametrize("memory", ["channels first", "channels last"])

VARIANTS = {
    "nothing": {"options": ()},
    "everything": {"options": ALL_OPTIONS, "noise": "per_pixel"},
    "everything and noise per element": {"options": ALL_OPTIONS, "noise": "per_element", "add_one": False},
    "statistics of its own": {"negative_slope": 1.0, "eps": 0.1},
    "zero where empty": {"empty": "zero", "noise": "per_element"},
    **{
        " ".join(group): {"options": group, "noise": "per_pixel" if group == ("noise_strength",) else None}
        for group in MODULATE_OPTIONS
    },
}


@functools.cache
def problem_of(variant: str, memory: str, channels: int, heads: int, dtype: torch.dtype) -> Problem:
    problem = modulate_problem(channels=channels, heads=heads, dtype=dtype, **VARIANTS[variant])
    return arranged(away_from_kink(problem), memory)


@functools.cache
def expected_of(*problem: object) -> dict[str, Tensor | None]:
    return expect(problem_of(*problem))


def assert_matches_reference(problem: Problem) -> None:
    problem = away_from_kink(problem)
    assert_accurate(problem, solve(problem, "cuda"), expect(problem))


@memory
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(cuda_order, variant, memory):
    problem = problem_of(variant, memory, 5, 2, torch.float32)
    assert_accurate(problem, solve(problem, "cuda"), expected_of(variant, memory, 5, 2, torch.float32))


@memory
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("channels", [1, 8, 40, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_widths(cuda_kernels, dtype, channels, heads, memory):
    variant = "everything and noise per element"
    problem = problem_of(variant, memory, channels, heads, dtype)
    assert_accurate(problem, solve(problem, "cuda"), expected_of(variant, memory, channels, heads, dtype))


@memory
@pytest.mark.parametrize("size", [(1, 37), (37, 1), (20, 33), (64, 40)], ids=str)
def test_sizes(cuda_kernels, size, memory):
    labels = random_map(2, *size, 5, seed=3)
    assert_matches_reference(arranged(modulate_problem(labels, channels=8, noise="per_element"), memory))


@memory
@pytest.mark.parametrize("empty", ["uniform", "zero"])
@pytest.mark.parametrize("edge", EDGES)
def test_edge_cases(cuda_kernels, edge, empty, memory):
    labels, layout, batch = EDGES[edge]
    problem = modulate_problem(labels, layout, batch=batch, channels=5, empty=empty, eps=0.1)
    problem = arranged(away_from_kink(problem), memory)
    assert_close(solve(problem, "cuda"), expect(problem), 2e-5)


@pytest.mark.parametrize("labels", MAPS)
def test_selections(cuda_kernels, labels):
    layout = LatentLayout((3, 1, 0, 2, 5)).present_in(MAPS[labels])
    options = ("key_bias", "row_bias", "empty_scale", "empty_shift")
    assert_matches_reference(modulate_problem(MAPS[labels], layout, channels=6, options=options))


def test_more_rows_than_shared_memory_has(cuda_order):
    layout = LatentLayout((40, 1, 0, 2, 50))
    assert_matches_reference(modulate_problem(LABELS, layout, channels=6, heads=2))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ["x", "out"])
def test_any_strides(cuda_kernels, name, arrangement):
    problem = modulate_problem(channels=8)
    if name == "x":
        problem = problem.with_tensors(x=arrangement(problem.tensors["x"]))
    else:
        problem = problem.with_gradients(out=arrangement(problem.gradients["out"]))
    assert_matches_reference(problem)


@pytest.mark.parametrize("wanted", ["x", "keys", "scale", "shift", *ALL_OPTIONS])
def test_gradient_of_one_input(cuda_kernels, wanted):
    problem = modulate_problem(channels=5, options=ALL_OPTIONS, noise="per_element")
    together, alone = solve(problem, "cuda"), solve(problem, "cuda", {wanted})
    names = ("out", f"grad_{wanted}")
    assert_same_bits({name: alone[name] for name in names}, {name: together[name] for name in names})


@memory
def test_a_large_map(cuda_kernels, memory):
    """Several tiles in a block of the backward pass, several blocks of a label."""
    labels = random_map(1, 150, 160, 3, seed=3)
    problem = modulate_problem(labels, LatentLayout((2, 1, 3)), batch=1, heads=1, channels=4, noise="per_element")
    assert_matches_reference(arranged(problem, memory))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_image(cuda_kernels, bad):
    problem = modulate_problem(channels=5)
    x = problem.tensors["x"].clone()
    x[1, 3, 2, 2] = bad
    actual, expected = solve(problem.with_tensors(x=x), "cuda"), solve(problem, "cuda")
    for name, value in expected.items():
        assert value is not None and torch.equal(actual[name][:1], value[:1]), name


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 2, 0)], ids=["no images", "no channels"])
@pytest.mark.parametrize("variant", ["nothing", "everything"])
def test_nothing_of_a_kind(cuda_kernels, sizes, variant):
    batch, heads, channels = sizes
    labels = random_map(batch or 1, 3, 4, 5)
    problem = modulate_problem(labels, batch=batch, heads=heads, channels=channels, **VARIANTS[variant])
    assert_close(solve(problem, "cuda"), expect(problem), 1e-5)
