"""Semantic pooling on the compiled kernels against the reference: results and every gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from folded import (
    ARRANGEMENTS,
    DTYPES,
    EDGES,
    EXPANSIONS,
    MEMORY,
    POOL_BIASES,
    POOL_RESULTS,
    Problem,
    Values,
    apply,
    arranged,
    assert_accurate,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    expanded,
    expect,
    pool_problem,
    solve,
)
from tokens import TOLERANCE, error_ratio, label_map, random_map
from torch import Tensor

import sca_kernels
from sca_kernels import LatentLayout, Pooled, semantic_pool

EMPTY = ("uniform", "zero")
GRADIENTS = ("grad_queries", "grad_x", "grad_row_bias", "grad_col_bias")

any_memory = pytest.mark.parametrize("memory", MEMORY)
either_empty = pytest.mark.parametrize("empty", EMPTY)


@functools.cache
def problem_and_expected(heads: int, channels: int, dtype: torch.dtype, empty: str) -> tuple[Problem, Values]:
    problem = pool_problem(heads=heads, channels=channels, dtype=dtype, empty=empty)
    return problem, expect(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5, 16, 40, 64, 129])
@pytest.mark.parametrize("heads", [1, 3])
@any_memory
def test_matches_reference(capability, dtype, channels, heads, memory):
    """Single channels, odd numbers, parts of a vector and whole vectors of every instruction set."""
    problem, expected = problem_and_expected(heads, channels, dtype, EMPTY[channels % 2])
    assert_accurate(problem, solve(arranged(problem, memory), "cpu"), expected)


@functools.cache
def size_and_expected(height: int, width: int, channels: int) -> tuple[Problem, Values]:
    problem = pool_problem(random_map(2, height, width, 3), LatentLayout((2, 5, 1)), channels=channels)
    return problem, expect(problem)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 37), (37, 1), (7, 9), (20, 33), (64, 40), (16, 256)], ids=str)
@pytest.mark.parametrize("channels", [20, 64])
@any_memory
def test_sizes(capability, size, channels, memory):
    problem, expected = size_and_expected(*size, channels)
    assert_close(solve(arranged(problem, memory), "cpu"), expected, TOLERANCE[torch.float32])


@functools.cache
def edge_and_expected(edge: str, empty: str, channels: int) -> tuple[Problem, Values]:
    labels, layout, batch = EDGES[edge]
    problem = pool_problem(labels, layout, batch=batch, channels=channels, empty=empty)
    return problem, expect(problem)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    ("empty", "memory"), [("uniform", "channels first"), ("uniform", "channels last"), ("zero", "channels last")]
)
@pytest.mark.parametrize("channels", [7, 64])
def test_edge_cases(capability, edge, empty, memory, channels):
    problem, expected = edge_and_expected(edge, empty, channels)
    assert_close(solve(arranged(problem, memory), "cpu"), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("options", [(), ("row_bias",), ("col_bias",), POOL_BIASES], ids=str)
@either_empty
@any_memory
def test_biases(capability, options, empty, memory):
    problem = pool_problem(channels=5, dtype=torch.float64, options=options, empty=empty)
    assert_matches_reference(arranged(problem, memory))


@pytest.mark.parametrize("flow", POOL_RESULTS)
@either_empty
def test_gradients_through_one_result(capability, flow, empty):
    problem = pool_problem(channels=5, dtype=torch.float64, empty=empty)
    results = assert_matches_reference(problem.changed(gradients={flow: problem.gradients[flow]}))
    reached = {name for name in GRADIENTS if results[name].any()}
    assert reached == ({"grad_x"} if flow in ("mean", "second_moment") else set(GRADIENTS))


@pytest.mark.parametrize("flow", POOL_RESULTS)
@either_empty
def test_gradients_through_all_results_but_one(native, flow, empty):
    problem = pool_problem(channels=5, dtype=torch.float64, empty=empty)
    assert_matches_reference(problem.with_gradients(**{flow: None}))


@pytest.mark.parametrize("wanted", ["queries", "x", "row_bias", "col_bias"])
@any_memory
def test_gradient_of_one_input(capability, wanted, memory):
    problem = arranged(pool_problem(channels=5), memory)
    alone, together = solve(problem, "cpu", wanted={wanted}), solve(problem, "cpu")
    others = {name for name in GRADIENTS if name != f"grad_{wanted}"}
    assert_close(alone, {name: None if name in others else value for name, value in together.items()}, 1e-6)


def test_results_that_nothing_flows_into(native):
    problem = pool_problem(channels=5).changed(gradients={})
    assert not any(solve(problem, "cpu")[name].any() for name in GRADIENTS)


@either_empty
def test_gradcheck(capability, empty):
    """The gradients against differences of the results of the same kernels."""
    labels, layout = label_map([[0, 0, 1], [2, -1, 0]], 4), LatentLayout((2, 0, 1, 1))
    problem = pool_problem(labels, layout, batch=1, channels=2, dtype=torch.float64, empty=empty)
    names = tuple(problem.tensors)

    def pool(*inputs: Tensor) -> tuple[Tensor, ...]:
        with sca_kernels.backend("cpu"):
            results = apply(problem, dict(zip(names, inputs, strict=True)))
        lse = results["lse"]
        results["lse"] = lse.masked_fill(lse == -torch.inf, 0)  # differences of infinities are not numbers
        return tuple(results.values())

    assert torch.autograd.gradcheck(pool, [tensor.requires_grad_() for tensor in problem.tensors.values()])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_meaning_on_paper(native, backend):
    """Numbers small enough to be worked out by hand."""
    labels, layout = label_map([[0, 0, 1], [0, -1, 1]], 3), LatentLayout((1, 1, 1))
    x = torch.tensor([[1.0, 2.0, 5.0], [3.0, 100.0, 7.0]]).view(1, 1, 2, 3)
    queries = torch.tensor([0.0, 0.0, 9.0]).view(1, 1, 3, 1)
    row_bias = torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.0, 0.0]]).log().nan_to_num(neginf=0).view(1, 1, 3, 2)
    with sca_kernels.backend(backend):
        uniform, zero = (semantic_pool(queries, x, layout, labels, row_bias=row_bias, empty=empty) for empty in EMPTY)
    # Label 0: the pixels 1, 2 and 3, the last of which counts twice; label 1: 5 and 7; label 2 has none.
    mean = 118 / 6
    torch.testing.assert_close(uniform.pooled.flatten(), torch.tensor([9 / 4, 6.0, mean]))
    torch.testing.assert_close(zero.pooled.flatten(), torch.tensor([9 / 4, 6.0, 0.0]))
    torch.testing.assert_close(zero.lse.flatten(), torch.tensor([4.0, 2.0, 0.0]).log())
    third = 1 / 3
    rows, columns = [[0.5, 0.5], [0.5, 0.5]], [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    torch.testing.assert_close(uniform.row_mass[0, 0], torch.tensor([*rows, [0.5, 0.5]]))
    torch.testing.assert_close(zero.row_mass[0, 0], torch.tensor([*rows, [0.0, 0.0]]))
    torch.testing.assert_close(uniform.col_mass[0, 0], torch.tensor([*columns, [third, third, third]]))
    torch.testing.assert_close(zero.col_mass[0, 0], torch.tensor([*columns, [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(zero.mean.flatten(), torch.tensor([mean]))
    torch.testing.assert_close(zero.second_moment.flatten(), torch.tensor([10088 / 6 - mean**2]))


def test_results_are_named_and_contiguous(capability):
    problem = pool_problem(channels=5)
    results = semantic_pool(problem.tensors["queries"], problem.tensors["x"], problem.layout, problem.labels)
    assert isinstance(results, Pooled) and Pooled._fields == POOL_RESULTS
    assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(capability, arrangement, dtype):
    for channels in (64, 5):
        problem = pool_problem(channels=channels, dtype=dtype)
        expected = expect(problem)
        problem = problem.with_tensors(x=arrangement(problem.tensors["x"]))
        assert_accurate(problem, solve(problem, "cpu"), expected)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_expanded(capability, expansion):
    for channels in (64, 5):
        problem = pool_problem(channels=channels)
        x = expanded(problem.tensors["x"], EXPANSIONS[expansion])
        assert_matches_reference(problem.with_tensors(x=x))


def test_strides_of_tables_and_their_gradients(capability):
    """Tables that are permuted or expanded, and what ``sum().backward()`` sends: one number, expanded."""
    problem = pool_problem(channels=8)

    def rearranged(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (
        rearranged,
        lambda tensor: tensor[:1].expand_as(tensor),
        lambda tensor: tensor.new_ones(()).expand_as(tensor),
    ):
        tensors = {name: change(tensor) for name, tensor in problem.tensors.items() if name != "x"}
        gradients = {name: change(tensor) for name, tensor in problem.gradients.items()}
        assert_matches_reference(problem.with_tensors(**tensors).with_gradients(**gradients))


@any_memory
def test_the_gradient_of_x_lies_in_memory_as_x_does(native, memory):
    problem = arranged(pool_problem(channels=8), memory)
    assert solve(problem, "cpu")["grad_x"].stride() == problem.tensors["x"].stride()


@any_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits(capability, memory, dtype):
    """Logits of up to 10,000, whole numbers so that they are exact: e to their power is far out of range."""
    problem = pool_problem(channels=4, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    random = {
        name: torch.randint(-50, 51, problem.tensors[name].shape, generator=generator) for name in ("queries", "x")
    }
    biases = {name: 8 * problem.tensors[name].round() for name in POOL_BIASES}
    for sign in (None, 1, -1):
        tensors = (
            random
            if sign is None
            else {"queries": torch.full_like(random["queries"], 50 * sign), "x": torch.full_like(random["x"], 50)}
        )
        these = arranged(
            problem.with_tensors(**{name: value.to(dtype) for name, value in tensors.items()}, **biases), memory
        )
        actual, expected = solve(these, "cpu"), expect(these)
        size = expected["lse"][expected["lse"].isfinite()].abs().max().item()
        assert size > 3000
        for name in POOL_RESULTS:
            assert error_ratio(actual[name], expected[name]) <= TOLERANCE[dtype], name
        # Backward takes the weights from the difference of a logit and an lse that has been rounded to the type.
        assert_close(actual, expected, size * torch.finfo(dtype).eps)


@any_memory
def test_large_mean(capability, memory):
    """A mean 10,000 times the deviation from it.

    The numbers are given as rounded to float32, so nothing but their sums can be inexact: a sum of squares would lose
    8 digits of the second moment, and all of it in float32.
    """
    problem = pool_problem(random_map(2, 20, 33, 3), LatentLayout((2, 1, 3)), channels=5)
    x = problem.tensors["x"]
    offset = torch.tensor([1e4, -1e4, 0.0, 1e4, 3.0]).view(1, 5, 1, 1)
    problem = arranged(problem.with_tensors(x=x + offset, queries=problem.tensors["queries"] * 1e-3), memory)
    actual, expected = solve(problem, "cpu", wanted=()), solve(problem.to(torch.float64), "reference", wanted=())
    assert error_ratio(actual["mean"], expected["mean"]) <= 1e-7
    assert error_ratio(actual["second_moment"], expected["second_moment"]) <= 1e-6
    for name in ("pooled", "row_mass", "col_mass"):
        assert error_ratio(actual[name], expected[name]) <= 1e-5 * expected["lse"].abs().max().item(), name


@any_memory
def test_moments_of_constant_channels(capability, memory):
    """Exactly the constant and zero, whatever the constant."""
    constants = torch.tensor([0.0, 0.1, -1e30, 1e-30, 3.0])
    problem = pool_problem(random_map(2, 20, 33, 3), LatentLayout((2, 1, 3)), channels=5)
    x = constants.view(1, 5, 1, 1).expand(2, 5, 20, 33).contiguous()
    results = solve(
        arranged(problem.with_tensors(x=x, queries=torch.zeros_like(problem.tensors["queries"])), memory),
        "cpu",
        wanted=(),
    )
    assert torch.equal(results["mean"], constants.expand(2, 5))
    assert not results["second_moment"].any()


@any_memory
def test_minus_infinity_forbids_a_row(capability, memory):
    """A logit of -inf beside finite ones is a weight of zero."""
    problem = arranged(
        pool_problem(random_map(2, 20, 33, 3, without=[-1]), LatentLayout((2, 1, 3)), channels=5), memory
    )
    row_bias = problem.tensors["row_bias"].clone()
    row_bias[..., ::2] = -torch.inf
    problem = problem.with_tensors(row_bias=row_bias)
    actual = assert_matches_reference(problem)
    assert not actual["row_mass"][..., ::2].any() and not actual["grad_row_bias"][..., ::2].any()


@functools.cache
def large_problem_and_expected() -> tuple[Problem, Values]:
    labels = random_map(1, 256, 256, 4, without=[2])
    problem = pool_problem(labels, LatentLayout((2, 3, 1, 0)), batch=1, heads=1, channels=64)
    return problem, expect(problem)


@pytest.mark.slow_under_sanitizer
@any_memory
def test_large_feature_map(capability, use_threads, memory):
    """A gradient of 16 MiB, which may be written in another way than a small one, by two threads."""
    problem, expected = large_problem_and_expected()
    use_threads(2)
    assert_close(solve(arranged(problem, memory), "cpu"), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 2, 0)], ids=["no images", "no heads", "no channels"])
@either_empty
def test_nothing_of_a_kind(native, sizes, empty):
    batch, heads, channels = sizes
    labels = random_map(1, 3, 4, 2)
    assert_matches_reference(
        pool_problem(labels, LatentLayout((2, 1)), batch=batch, heads=heads, channels=channels, empty=empty)
    )


def test_latents_without_pixels(capability):
    """The mean over all pixels or zero, an lse of -inf, and a gradient that reaches x alone, in equal shares."""
    labels, layout = label_map([[0, 1, 1, -1]], 3), LatentLayout((2, 0, 3))
    problem = pool_problem(labels, layout, batch=1, heads=1, channels=4)
    without = [2, 3, 4]
    uniform, zero = (solve(problem.with_settings(empty=empty), "cpu") for empty in EMPTY)
    assert uniform["lse"].isneginf().flatten().nonzero().flatten().tolist() == without
    torch.testing.assert_close(uniform["pooled"][0, 0, without], uniform["mean"].expand(3, 4))
    assert (uniform["col_mass"][0, 0, without] == 0.25).all() and (uniform["row_mass"][0, 0, without] == 1).all()
    for name in ("pooled", "row_mass", "col_mass"):
        assert not zero[name][0, 0, without].any()
    for results in (uniform, zero):
        for name in ("grad_queries", "grad_row_bias", "grad_col_bias"):
            assert not results[name][0, 0, without].any()
    share = problem.gradients["pooled"][0, 0, without].sum(0) / 4
    torch.testing.assert_close(uniform["grad_x"] - zero["grad_x"], share.view(1, 4, 1, 1).expand(1, 4, 1, 4))
    assert_same_bits(
        {name: value for name, value in uniform.items() if name in ("grad_queries", "grad_row_bias", "grad_col_bias")},
        {name: value for name, value in zero.items() if name in ("grad_queries", "grad_row_bias", "grad_col_bias")},
    )
