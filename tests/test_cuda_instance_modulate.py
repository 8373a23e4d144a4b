"""instance_modulate in CUDA C++ against the reference: results and every gradient, by the host or on a GPU."""

from __future__ import annotations

import functools

import emulation
import pytest
import torch
from folded import ARRANGEMENTS, EXPANSIONS, assert_close, assert_same_bits, expanded
from instances import (
    CASES,
    MEMORY,
    Problem,
    assert_accurate,
    assert_matches_reference,
    away_from_kink,
    expect,
    make_problem,
    solve,
)

from sca_kernels import cuda

pytestmark = pytest.mark.cuda

case = pytest.mark.parametrize("case", CASES)
memory = pytest.mark.parametrize("memory", MEMORY)
# Channels, height, width: odd numbers, and packs of adjacent numbers in either direction.
SIZES = ((5, 7, 9), (16, 6, 8))


@functools.cache
def problem_of(case: str, sizes: tuple[int, int, int], dtype: torch.dtype, memory: str) -> Problem:
    channels, height, width = sizes
    problem = make_problem(channels=channels, height=height, width=width, dtype=dtype, **CASES[case])
    return away_from_kink(problem).arranged(MEMORY[memory])


@functools.cache
def expected_of(*problem: object) -> dict[str, torch.Tensor]:
    return expect(problem_of(*problem))


@case
@memory
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(cuda_order, case, sizes, memory):
    problem = problem_of(case, sizes, torch.float32, memory)
    assert_accurate(problem, solve(problem, "cuda"), expected_of(case, sizes, torch.float32, memory))


@case
@memory
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_as_accurate_as_the_reference_in_16_bits(cuda_kernels, case, sizes, dtype, memory):
    problem = problem_of(case, sizes, dtype, memory)
    assert_accurate(problem, solve(problem, "cuda"), expected_of(case, sizes, dtype, memory))


@memory
@pytest.mark.parametrize("case", ["maps", "channels", "a map of offsets"])
@pytest.mark.parametrize("sizes", [(2, 100, 120), (40, 33, 20), (300, 4, 4)], ids=str)
def test_several_chunks_and_blocks_of_channels(cuda_kernels, case, sizes, memory):
    problem = problem_of(case, sizes, torch.float32, memory)
    assert_accurate(problem, solve(problem, "cuda"), expected_of(case, sizes, torch.float32, memory))


@pytest.mark.parametrize("case", ["maps", "images"])
@memory
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_the_type_that_is_computed_in(cuda_kernels, case, dtype, memory):
    problem = make_problem(channels=16, height=6, width=8, dtype=torch.float64, **CASES[case])
    problem = away_from_kink(problem.to(dtype, torch.float32)).arranged(MEMORY[memory])
    actual = assert_matches_reference(problem, "cuda")
    assert actual["grad_gamma"].dtype == actual["grad_beta"].dtype == torch.float32


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ["all", "x", "gamma", "beta", "grad_out"])
def test_any_strides(cuda_kernels, name, arrangement):
    problem = away_from_kink(make_problem(channels=8, height=6, width=8, **CASES["maps"]))
    if name == "all":
        problem = problem.arranged(arrangement)
    elif name == "grad_out":
        problem = problem.changed(grad_out=arrangement(problem.grad_out))
    else:
        problem = problem.with_tensors(**{name: arrangement(problem.tensors[name])})
    assert_matches_reference(problem, "cuda")


@pytest.mark.parametrize("dimensions", EXPANSIONS.values(), ids=EXPANSIONS)
@pytest.mark.parametrize("name", ["x", "gamma", "grad_out"])
def test_expanded(cuda_kernels, name, dimensions):
    problem = make_problem(channels=8, height=6, width=8, **CASES["maps"])
    if name == "grad_out":
        problem = problem.changed(grad_out=expanded(problem.grad_out, dimensions))
    else:
        problem = problem.with_tensors(**{name: expanded(problem.tensors[name], dimensions)})
    problem = away_from_kink(problem)
    if name == "x" and dimensions in ((2, 3), (0, 1, 2, 3)):
        # All that is left of the gradient is what rounding makes of zero.
        problem = problem.with_settings(eps=1.0)
    expected, actual = expect(problem), solve(problem, "cuda")
    if name == "x":
        size = problem.grad_out.norm().item()
        assert (actual.pop("grad_x") - expected.pop("grad_x")).norm().item() <= 1e-5 * size
    assert_close(actual, expected, 1e-5)


def test_results_lie_in_memory_as_x_does(cuda_kernels):
    problem = make_problem(dtype=torch.bfloat16, **CASES["maps"])
    for arrange in MEMORY.values():
        arranged = problem.arranged(arrange, torch.clone)
        results = solve(arranged, "cuda")
        for name in ("out", "grad_x", "grad_gamma", "grad_beta"):
            assert results[name].stride() == arranged.tensors["x"].stride()


@pytest.mark.parametrize("wanted", ["x", "gamma", "beta", "mean", "rstd", "noise_strength"])
@pytest.mark.parametrize("case", ["maps", "images", "channels"])
@memory
def test_a_gradient_does_not_depend_on_which_others_are_wanted(cuda_kernels, case, wanted, memory):
    problem = make_problem(channels=16, height=6, width=8, **CASES[case]).arranged(MEMORY[memory])
    if wanted in problem.tensors:
        together = solve(problem, "cuda")
        name = f"grad_{wanted}"
        assert_same_bits(solve(problem, "cuda", {wanted}), {"out": together["out"], name: together[name]})


@case
@memory
def test_the_order_of_threads_changes_no_bit(cuda_kernels, case, memory):
    """On a GPU: calls that follow one another."""
    problem = problem_of(case, (5, 33, 40), torch.bfloat16, memory)
    backwards = solve(problem, "cuda")
    if cuda.why_not() is not None:
        emulation.emulate("256 threads")
    assert_same_bits(solve(problem, "cuda"), backwards)


@memory
@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_mean_that_is_large_beside_the_deviations(cuda_order, mean, memory):
    """A float32 of that size is in steps of 0.001, or of 0.06; the numbers given are what is normalised."""
    problem = make_problem(channels=4, height=20, width=30)
    x = torch.randn(2, 4, 20, 30, generator=torch.Generator().manual_seed(3)) + mean
    plain = Problem({"x": x}, {"negative_slope": 1.0}, problem.grad_out).arranged(MEMORY[memory])
    actual, expected = solve(plain, "cuda"), expect(plain)
    assert (actual["out"] - expected["out"]).abs().max().item() <= 2e-6
    assert_close(actual, expected, 1e-6)


@memory
def test_an_outlier_in_front(cuda_order, memory):
    x = torch.randn(1, 4, 20, 30, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 300.0
    problem = Problem({"x": MEMORY[memory](x)}, {"negative_slope": 1.0}, torch.randn_like(x))
    assert_matches_reference(problem, "cuda")


@memory
@pytest.mark.parametrize("sizes", [(1, 1), (9, 7), (16, 64)], ids=str)
def test_channels_without_deviations_give_zero(cuda_order, sizes, memory):
    """Exactly, whatever their value, so that beta is what comes out; a single pixel is such a channel."""
    values = torch.tensor([0.1, -3.7, 1e4, 0.0, 1e-6]).view(1, 5, 1, 1)
    x, beta = MEMORY[memory](values.expand(2, 5, *sizes)), torch.randn(5)
    problem = Problem({"x": x, "gamma": torch.randn(5), "beta": beta}, {"negative_slope": 1.0}, torch.zeros_like(x))
    for unbiased in (False, True):
        out = solve(problem.with_settings(unbiased=unbiased), "cuda")["out"]
        assert torch.equal(out, beta.view(1, 5, 1, 1).expand_as(out))


@memory
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_channel(cuda_kernels, bad, memory):
    problem = make_problem(channels=8, **CASES["channels"]).arranged(MEMORY[memory])
    spoilt = problem.tensors["x"].clone()
    spoilt[1, 3, 2, 2] = bad
    actual, expected = solve(problem.with_tensors(x=spoilt), "cuda"), solve(problem, "cuda")
    for name in ("out", "grad_x"):
        assert actual[name][1, 3].isnan().all()
        actual[name][1, 3] = expected[name][1, 3] = 0
        assert torch.equal(actual[name], expected[name])


EDGES = {
    "no images": (0, 5, 7, 9),
    "no channels": (2, 0, 7, 9),
    "no rows": (2, 5, 0, 9),
    "no columns": (2, 5, 7, 0),
    "nothing": (0, 0, 0, 0),
    "a pixel": (2, 5, 1, 1),
    "a row": (2, 5, 1, 700),
    "a column": (2, 5, 700, 1),
    "a channel": (1, 1, 50, 50),
    "many channels": (1, 700, 2, 3),
    "many images": (40, 2, 3, 3),
}


@memory
@pytest.mark.parametrize("case", ["maps", "channels"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(cuda_kernels, case, edge, memory):
    batch, channels, height, width = EDGES[edge]
    problem = make_problem(batch=batch, channels=channels, height=height, width=width, **CASES[case])
    problem = away_from_kink(problem).arranged(MEMORY[memory])
    expected, actual = expect(problem), solve(problem, "cuda")
    if edge == "a pixel":  # of whose gradient nothing is left
        grad_x, wanted = actual.pop("grad_x"), expected.pop("grad_x")
        assert (grad_x - wanted).abs().max().item() <= 1e-4
    assert_close(actual, expected, 1e-5)
    if 0 in EDGES[edge]:
        for name, tensor in problem.tensors.items():
            assert actual[f"grad_{name}"].shape == tensor.shape and not actual[f"grad_{name}"].any()
