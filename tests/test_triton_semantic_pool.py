"""semantic_pool in Triton against the reference: results and every gradient, in the interpreter or on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from folded import (
    ARRANGEMENTS,
    EDGES,
    EXPANSIONS,
    MEMORY,
    POOL_BIASES,
    POOL_RESULTS,
    Problem,
    arranged,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    expanded,
    expect,
    image,
    pool_problem,
    solve,
)
from tiles import use_small_tiles
from tokens import TOLERANCE, error_ratio, random_map

from sca_kernels import LabelMap, LatentLayout

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("triton_kernels")]

GRADIENTS = ("grad_queries", "grad_x", "grad_row_bias", "grad_col_bias")
SMALL_EDGES = [name for name, (labels, _, _) in EDGES.items() if labels.height * labels.width <= 45]

any_memory = pytest.mark.parametrize("memory", MEMORY)

# Few labels, latents and pixels: the interpreter takes milliseconds for each program.
PIXELS, LATENTS = random_map(2, 3, 5, 3, without=[2], seed=1), LatentLayout((2, 0, 1))
check = functools.partial(assert_matches_reference, backend="triton")


def small_problem(labels: LabelMap = PIXELS, layout: Any = LATENTS, **arguments: Any) -> Problem:
    return pool_problem(labels, layout, **{"heads": 1, "channels": 5, **arguments})


@pytest.mark.parametrize(
    ("dtype", "memory", "heads", "channels", "empty"),
    [
        (torch.float32, "channels first", 2, 5, "uniform"),
        (torch.bfloat16, "channels last", 1, 70, "zero"),
        (torch.float16, "channels first", 3, 16, "uniform"),
    ],
    ids=str,
)
def test_matches_reference(dtype, memory, heads, channels, empty):
    check(arranged(pool_problem(heads=heads, channels=channels, dtype=dtype, empty=empty), memory))


@any_memory
def test_several_blocks_of_a_label(monkeypatch, memory):
    """And several parts of the channels, and chunks of partial rows and of lines, with ends that are not full."""
    use_small_tiles(monkeypatch)
    problem = small_problem(random_map(1, 7, 17, 2), LatentLayout((3, 1)), batch=1, channels=37)
    check(arranged(problem, memory))


def test_many_latents():
    """The configurations for them."""
    labels = random_map(1, 3, 5, 2)
    for heads, layout in ((2, LatentLayout((33, 1))), (1, LatentLayout((130, 0)))):
        check(small_problem(labels, layout, batch=1, heads=heads))


@pytest.mark.parametrize("edge", SMALL_EDGES)
def test_edge_cases(edge):
    labels, layout, batch = EDGES[edge]
    empty = ("uniform", "zero")[SMALL_EDGES.index(edge) % 2]
    problem = pool_problem(labels, layout, batch=batch, heads=1, channels=3, empty=empty)
    assert_close(solve(problem, "triton"), expect(problem), TOLERANCE[torch.float32])


def test_every_pixel_its_own_label():
    labels = LabelMap.from_labels(torch.arange(12).view(1, 3, 4), 12)
    check(pool_problem(labels, LatentLayout((1, 2, 0, 1) * 3), batch=1, heads=1, channels=3))


def test_labels_out_of_range_are_ignored():
    labels = torch.tensor([[[0, 7, 1], [-5, 2, 0]]], dtype=torch.int32)
    problem = small_problem(LabelMap(torch.where((labels < 0) | (labels > 2), -1, labels), 3), batch=1)
    assert_same_bits(solve(problem.changed(labels=LabelMap(labels, 3)), "triton"), check(problem))


@pytest.mark.parametrize("options", [(), ("row_bias",), ("col_bias",)], ids=str)
def test_biases(options):
    check(small_problem(options=options))


@pytest.mark.parametrize("flow", POOL_RESULTS)
def test_gradients_through_one_result(flow):
    problem = small_problem()
    results = check(problem.changed(gradients={flow: problem.gradients[flow]}))
    reached = {name for name in GRADIENTS if results[name].any()}
    assert reached == ({"grad_x"} if flow in ("mean", "second_moment") else set(GRADIENTS))


@pytest.mark.parametrize("wanted", ["queries", "x", *POOL_BIASES])
def test_gradient_of_one_input(wanted):
    problem = small_problem()
    alone, expected = solve(problem, "triton", wanted={wanted}), expect(problem)
    others = {name for name in GRADIENTS if name != f"grad_{wanted}"}
    assert_close(alone, {name: None if name in others else value for name, value in expected.items()}, 1e-5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_any_strides(arrangement):
    problem = small_problem(batch=2)
    check(problem.with_tensors(x=arrangement(problem.tensors["x"])))


@pytest.mark.parametrize("dimensions", EXPANSIONS.values(), ids=EXPANSIONS)
def test_expanded(dimensions):
    problem = small_problem()
    check(problem.with_tensors(x=expanded(problem.tensors["x"], dimensions)))


def test_selection():
    """Rows of tables then differ from image to image, and some are padding."""
    labels, layout = random_map(2, 3, 5, 3, without=[1]), LatentLayout((2, 1, 1))
    labels.labels[0].clamp_(max=0)
    check(small_problem(labels, layout.present_in(labels)))


@any_memory
def test_large_mean(memory):
    """10,000 times the deviations from it: a sum of squares would leave nothing of them in float32."""
    problem = small_problem()
    offset = torch.tensor([1e4, -1e4, 0.0, 1e4, 3.0]).view(1, 5, 1, 1)
    queries = problem.tensors["queries"] * 1e-3
    problem = arranged(problem.with_tensors(x=problem.tensors["x"] + offset, queries=queries), memory)
    actual, expected = solve(problem, "triton", wanted=()), solve(problem.to(torch.float64), "reference", wanted=())
    assert error_ratio(actual["mean"], expected["mean"]) <= 1e-7
    assert error_ratio(actual["second_moment"], expected["second_moment"]) <= 1e-6


def test_moments_of_constant_channels():
    """Exactly the constant and zero."""
    problem = small_problem()
    constants = torch.tensor([0.0, 0.1, -1e30, 1e-30, 3.0])
    x = constants.view(1, 5, 1, 1).expand(2, 5, 3, 5).contiguous()
    problem = problem.with_tensors(x=x, queries=torch.zeros_like(problem.tensors["queries"]))
    results = solve(problem, "triton", wanted=())
    assert torch.equal(results["mean"], constants.expand(2, 5))
    assert not results["second_moment"].any()


def test_large_logits(monkeypatch):
    """e to their power is far out of range, in the first block or in a later one; -inf is a weight of zero."""
    use_small_tiles(monkeypatch)
    labels = LabelMap.from_labels(torch.zeros(1, 5, 11, dtype=torch.int32), 1)
    problem = pool_problem(labels, LatentLayout((2,)), batch=1, heads=1, channels=2)
    row_bias = torch.tensor([[-torch.inf, -4096.0, 2048.0, 2047.5, -torch.inf], [4096.0, 4095.0, 0.0, 0.0, 4096.0]])
    problem = problem.with_tensors(row_bias=row_bias.view(1, 1, 2, 5))
    # The weights of the backward pass come from the difference of a logit and an lse that has been rounded.
    actual = check(problem, tolerance=4096 * torch.finfo(torch.float32).eps)
    assert not actual["row_mass"][..., 0, 0].any() and not actual["grad_row_bias"][..., 0, 0].any()


@pytest.mark.parametrize("sizes", [(0, 1, 3), (2, 0, 3), (2, 1, 0)], ids=["no images", "no heads", "no channels"])
def test_nothing_of_a_kind(sizes):
    batch, heads, channels = sizes
    check(small_problem(random_map(1, 3, 4, 3), batch=batch, heads=heads, channels=channels))


def test_nan_stays_in_its_image():
    problem = small_problem()
    spoiled = problem.tensors["x"].clone()
    spoiled[0, 0, 0, 0] = torch.nan
    actual, expected = solve(problem.with_tensors(x=spoiled), "triton"), solve(problem, "triton")
    assert_same_bits(image(actual, 1), image(expected, 1))
    assert image(actual, 0)["mean"].isnan().any()


def test_too_many_latents_are_refused():
    problem = small_problem(random_map(1, 2, 2, 1), LatentLayout((129,)), batch=1, heads=2)
    with pytest.raises(ValueError, match="layout: the backend 'triton' expects at most 256 latents"):
        solve(problem, "triton")
