"""instance_modulate in Triton against the reference: results and every gradient, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from folded import ARRANGEMENTS, EXPANSIONS, assert_close, assert_same_bits, expanded
from instances import (
    CASES,
    MEMORY,
    Problem,
    assert_matches_reference,
    away_from_kink,
    expect,
    make_problem,
    solve,
)
from tiles import use_small_tiles

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("triton_kernels")]

case = pytest.mark.parametrize("case", CASES)
memory = pytest.mark.parametrize("memory", MEMORY)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@case
@pytest.mark.parametrize(
    ("dtype", "memory"),
    [(torch.float32, "channels first"), (torch.bfloat16, "channels last"), (torch.float16, "channels first")],
    ids=str,
)
def test_matches_reference(case, dtype, memory):
    problem = away_from_kink(make_problem(channels=5, height=5, width=7, dtype=dtype, **CASES[case]))
    assert_matches_reference(problem.arranged(MEMORY[memory]), "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ["maps", "channels", "a map of offsets"])
@memory
def test_several_tiles_and_chunks(case, memory):
    problem = away_from_kink(make_problem(channels=6, height=7, width=11, **CASES[case]))
    assert_matches_reference(problem.arranged(MEMORY[memory]), "triton")


@pytest.mark.parametrize("case", ["maps", "images"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_the_type_that_is_computed_in(case, dtype):
    problem = away_from_kink(make_problem(dtype=torch.float64, **CASES[case]).to(dtype, torch.float32))
    actual = assert_matches_reference(problem, "triton")
    assert actual["grad_gamma"].dtype == actual["grad_beta"].dtype == torch.float32


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ["all", "gamma"])
def test_any_strides(name, arrangement):
    problem = away_from_kink(make_problem(**CASES["maps"]))
    if name == "all":
        problem = problem.arranged(arrangement)
    else:
        problem = problem.with_tensors(**{name: arrangement(problem.tensors[name])})
    assert_matches_reference(problem, "triton")


@pytest.mark.parametrize("dimensions", EXPANSIONS.values(), ids=EXPANSIONS)
@pytest.mark.parametrize("name", ["x", "gamma"])
def test_expanded(name, dimensions):
    problem = make_problem(**CASES["maps"])
    problem = problem.with_tensors(**{name: expanded(problem.tensors[name], dimensions)})
    problem = away_from_kink(problem)
    if name == "x" and dimensions in ((2, 3), (0, 1, 2, 3)):
        # All that is left of the gradient is what rounding makes of zero.
        problem = problem.with_settings(eps=1.0)
    expected, actual = expect(problem), solve(problem, "triton")
    if name == "x":
        size = problem.grad_out.norm().item()
        assert (actual.pop("grad_x") - expected.pop("grad_x")).norm().item() <= 1e-5 * size
    assert_close(actual, expected, 1e-5)


def test_results_lie_in_memory_as_x_does():
    problem = make_problem(dtype=torch.bfloat16, **CASES["maps"])
    for arrange in MEMORY.values():
        arranged = problem.arranged(arrange, torch.clone)
        results = solve(arranged, "triton")
        strides = arranged.tensors["x"].stride()
        for name in ("out", "grad_x", "grad_gamma", "grad_beta"):
            assert results[name].stride() == strides


@pytest.mark.parametrize("wanted", ["x", "gamma", "beta", "mean", "rstd", "noise_strength"])
@pytest.mark.parametrize("case", ["maps", "images"])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(case, wanted):
    problem = make_problem(**CASES[case])
    if wanted in problem.tensors:
        together = solve(problem, "triton")
        name = f"grad_{wanted}"
        assert_same_bits(solve(problem, "triton", {wanted}), {"out": together["out"], name: together[name]})


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_mean_that_is_large_beside_the_deviations(mean):
    """A float32 of that size is in steps of 0.001, or of 0.06; the numbers given are what is normalised."""
    problem = make_problem(channels=4, height=9, width=10)
    x = torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(3)) + mean
    plain = Problem({"x": x}, {"negative_slope": 1.0}, problem.grad_out)
    actual, expected = solve(plain, "triton"), expect(plain)
    assert (actual["out"] - expected["out"]).abs().max().item() <= 2e-6
    assert_close(actual, expected, 1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_an_outlier_in_front():
    x = torch.randn(1, 4, 9, 10, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 300.0
    assert_matches_reference(Problem({"x": x}, {"negative_slope": 1.0}, torch.randn_like(x)), "triton")


@pytest.mark.usefixtures("small_tiles")
@memory
@pytest.mark.parametrize("sizes", [(1, 1), (9, 7)], ids=str)
def test_channels_without_deviations_give_zero(sizes, memory):
    """Exactly, whatever their value, so that beta is what comes out; a single pixel is such a channel."""
    values = torch.tensor([0.1, -3.7, 1e4, 0.0, 1e-6]).view(1, 5, 1, 1)
    x, beta = MEMORY[memory](values.expand(2, 5, *sizes)), torch.randn(5)
    problem = Problem({"x": x, "gamma": torch.randn(5), "beta": beta}, {"negative_slope": 1.0}, torch.zeros_like(x))
    for unbiased in (False, True):
        out = solve(problem.with_settings(unbiased=unbiased), "triton")["out"]
        assert torch.equal(out, beta.view(1, 5, 1, 1).expand_as(out))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_channel(bad):
    problem = make_problem(**CASES["channels"])
    spoilt = problem.tensors["x"].clone()
    spoilt[1, 3, 2, 2] = bad
    actual, expected = solve(problem.with_tensors(x=spoilt), "triton"), solve(problem, "triton")
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
    "a row": (2, 5, 1, 300),
    "a column": (2, 5, 300, 1),
    "a channel": (1, 1, 7, 7),
    "many channels": (1, 70, 2, 3),
}


@pytest.mark.parametrize("case", ["maps", "channels"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(case, edge):
    batch, channels, height, width = EDGES[edge]
    problem = away_from_kink(make_problem(batch=batch, channels=channels, height=height, width=width, **CASES[case]))
    expected, actual = expect(problem), solve(problem, "triton")
    if edge == "a pixel":  # of whose gradient nothing is left
        grad_x, wanted = actual.pop("grad_x"), expected.pop("grad_x")
        assert (grad_x - wanted).abs().max().item() <= 1e-4
    assert_close(actual, expected, 1e-5)
    if 0 in EDGES[edge]:
        for name, tensor in problem.tensors.items():
            assert actual[f"grad_{name}"].shape == tensor.shape and not actual[f"grad_{name}"].any()
