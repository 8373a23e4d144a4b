"""semantic_pool in CUDA C++ against the reference: results and every gradient, by the host or on a GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from folded import (
    ARRANGEMENTS,
    EDGES,
    LABELS,
    MAPS,
    POOL_BIASES,
    POOL_RESULTS,
    Problem,
    arranged,
    assert_accurate,
    assert_close,
    assert_same_bits,
    expect,
    pool_problem,
    solve,
)
from tokens import random_map
from torch import Tensor

from sca_kernels import LatentLayout

pytestmark = pytest.mark.cuda

memory = pytest.mark.parametrize("memory", ["channels first", "channels last"])
VARIANTS = {
    "biases": {},
    "no biases": {"options": ()},
    "rows": {"options": ("row_bias",)},
    "columns, zero where empty": {"options": ("col_bias",), "empty": "zero"},
}


@functools.cache
def problem_of(variant: str, memory: str, channels: int, heads: int, dtype: torch.dtype) -> Problem:
    return arranged(pool_problem(channels=channels, heads=heads, dtype=dtype, **VARIANTS[variant]), memory)


@functools.cache
def expected_of(*problem: object) -> dict[str, Tensor | None]:
    return expect(problem_of(*problem))


def assert_matches_reference(problem: Problem) -> None:
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
    problem = problem_of("biases", memory, channels, heads, dtype)
    assert_accurate(problem, solve(problem, "cuda"), expected_of("biases", memory, channels, heads, dtype))


@memory
@pytest.mark.parametrize("size", [(1, 37), (37, 1), (20, 33), (64, 40)], ids=str)
def test_sizes(cuda_kernels, size, memory):
    assert_matches_reference(arranged(pool_problem(random_map(2, *size, 5, seed=3), channels=8), memory))


@memory
@pytest.mark.parametrize("empty", ["uniform", "zero"])
@pytest.mark.parametrize("edge", EDGES)
def test_edge_cases(cuda_kernels, edge, empty, memory):
    labels, layout, batch = EDGES[edge]
    problem = arranged(pool_problem(labels, layout, batch=batch, channels=5, empty=empty), memory)
    assert_close(solve(problem, "cuda"), expect(problem), 2e-5)


@pytest.mark.parametrize("labels", MAPS)
def test_selections(cuda_kernels, labels):
    layout = LatentLayout((3, 1, 0, 2, 5)).present_in(MAPS[labels])
    assert_matches_reference(pool_problem(MAPS[labels], layout, channels=6))


def test_more_rows_than_shared_memory_has(cuda_order):
    assert_matches_reference(pool_problem(LABELS, LatentLayout((40, 1, 0, 2, 50)), channels=6, heads=2))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_any_strides(cuda_kernels, arrangement):
    problem = pool_problem(channels=8)
    assert_matches_reference(problem.with_tensors(x=arrangement(problem.tensors["x"])))


@pytest.mark.parametrize("wanted", ["queries", "x", *POOL_BIASES])
def test_gradient_of_one_input(cuda_kernels, wanted):
    problem = pool_problem(channels=5)
    together, alone = solve(problem, "cuda"), solve(problem, "cuda", {wanted})
    assert_same_bits({f"grad_{wanted}": alone[f"grad_{wanted}"]}, {f"grad_{wanted}": together[f"grad_{wanted}"]})


@pytest.mark.parametrize("result", POOL_RESULTS)
def test_gradient_through_one_result(cuda_kernels, result):
    problem = pool_problem(channels=5)
    problem = problem.changed(gradients={result: problem.gradients[result]})
    assert_close(solve(problem, "cuda"), expect(problem), 1e-5)


@memory
def test_large_logits(cuda_kernels, memory):
    problem = pool_problem(channels=5)
    problem = problem.with_tensors(queries=30 * problem.tensors["queries"])
    assert_close(solve(arranged(problem, memory), "cuda"), expect(problem), 1e-4)


@memory
def test_a_large_map(cuda_kernels, memory):
    """Several tiles in a block, several blocks of a label."""
    labels = random_map(1, 150, 160, 3, seed=3)
    problem = pool_problem(labels, LatentLayout((2, 1, 3)), batch=1, heads=1, channels=4)
    assert_matches_reference(arranged(problem, memory))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_image(cuda_kernels, bad):
    problem = pool_problem(channels=5)
    x = problem.tensors["x"].clone()
    x[1, 3, 2, 2] = bad
    actual, expected = solve(problem.with_tensors(x=x), "cuda"), solve(problem, "cuda")
    for name, value in expected.items():
        assert value is not None and torch.equal(actual[name][:1], value[:1]), name


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 2, 0)], ids=["no images", "no channels"])
def test_nothing_of_a_kind(cuda_kernels, sizes):
    batch, heads, channels = sizes
    problem = pool_problem(random_map(batch or 1, 3, 4, 5), batch=batch, heads=heads, channels=channels)
    assert_close(solve(problem, "cuda"), expect(problem), 1e-5)
