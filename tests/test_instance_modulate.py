"""instance_modulate on the compiled kernels against the reference: results and every gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folded import ARRANGEMENTS, EXPANSIONS, assert_close, assert_same_bits, expanded, image
from instances import (
    CASES,
    DTYPES,
    MEMORY,
    Problem,
    assert_accurate,
    assert_matches_reference,
    away_from_kink,
    expect,
    make_problem,
    solve,
)
from torch import Tensor

from sca_kernels import backend, cpu, instance_modulate

case = pytest.mark.parametrize("case", CASES)
memory = pytest.mark.parametrize("memory", MEMORY)
# Channels, height, width: single ones, odd ones, parts of a vector and whole ones of every instruction set, several
# tiles, several chunks.
SIZES = ((1, 7, 9), (5, 7, 9), (16, 8, 8), (37, 5, 16), (64, 17, 4), (3, 40, 31))


@functools.cache
def problem_and_expected(
    case: str, sizes: tuple[int, int, int], dtype: torch.dtype, memory: str
) -> tuple[Problem, dict[str, Tensor]]:
    channels, height, width = sizes
    problem = away_from_kink(make_problem(channels=channels, height=height, width=width, dtype=dtype, **CASES[case]))
    return problem.arranged(MEMORY[memory]), expect(problem)


@case
@memory
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_reference(capability, case, sizes, dtype, memory):
    problem, expected = problem_and_expected(case, sizes, dtype, memory)
    actual = solve(problem, "cpu")
    assert all(value.dtype == dtype for value in actual.values())
    assert_accurate(problem, actual, expected)


@case
@memory
@pytest.mark.parametrize("sizes", [(5, 7, 9), (32, 8, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_as_accurate_as_the_reference_in_16_bits(capability, case, sizes, dtype, memory):
    problem, expected = problem_and_expected(case, sizes, dtype, memory)
    assert_accurate(problem, solve(problem, "cpu"), expected)


@memory
@pytest.mark.parametrize("case", ["maps", "channels", "images"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_the_type_that_is_computed_in(capability, case, dtype, memory):
    """What a layer outside of autocast gives; their gradients are not rounded to the type of x."""
    problem = make_problem(channels=16, dtype=torch.float64, **CASES[case]).to(dtype, torch.float32)
    problem = away_from_kink(problem).arranged(MEMORY[memory])
    actual = assert_matches_reference(problem)
    assert actual["grad_gamma"].dtype == actual["grad_beta"].dtype == torch.float32
    mixed = problem.with_tensors(beta=problem.tensors["beta"].to(dtype))
    assert assert_matches_reference(mixed)["grad_beta"].dtype == dtype


@memory
def test_meaning_on_paper(capability, memory):
    """Numbers small enough to be worked out by hand, for both backends."""
    x = MEMORY[memory](torch.tensor([1.0, 3.0, 1.0, 3.0, 6.0, 6.0, 0.0, 0.0]).view(1, 2, 2, 2))
    gamma = MEMORY[memory](torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 2, 2).expand(1, 2, 2, 2))
    noise, strength = torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, -10.0])
    for name in ("cpu", "reference"):
        with backend(name):
            norm = instance_modulate(x, eps=0.0, negative_slope=1.0)
            out = instance_modulate(x, gamma, torch.tensor([0.5, 0.0]), eps=0.0, noise=noise, noise_strength=strength)
            unbiased = instance_modulate(x, eps=0.0, negative_slope=1.0, unbiased=True)
            given = instance_modulate(x, stats=(torch.tensor(1.0), torch.tensor([[0.5, 2.0]])), negative_slope=0.5)
        ones = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
        torch.testing.assert_close(norm.flatten(), ones)
        expected = torch.tensor([-0.3, 2.5, -0.3, 2.5, 2.0, -1.8, -0.4, -2.2])
        torch.testing.assert_close(out.flatten(), expected)
        torch.testing.assert_close(unbiased.flatten(), ones * 0.75**0.5)
        torch.testing.assert_close(given.flatten(), torch.tensor([0.0, 1.0, 0.0, 1.0, 10.0, 10.0, -1.0, -1.0]))


@memory
def test_is_instance_norm_of_pytorch(capability, memory):
    x = MEMORY[memory](make_problem(channels=6, height=20, width=30).tensors["x"])
    weight, bias = torch.randn(6), torch.randn(6)
    actual = instance_modulate(x, weight, bias, add_one=False, negative_slope=1.0, eps=1e-3)
    torch.testing.assert_close(actual, F.instance_norm(x, weight=weight, bias=bias, eps=1e-3))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["maps", "given statistics"])
def test_any_strides(capability, case, arrangement, dtype):
    for sizes in ({"channels": 5}, {"channels": 32, "height": 6, "width": 16}):
        problem = away_from_kink(make_problem(dtype=dtype, **sizes, **CASES[case]))
        assert_matches_reference(problem.arranged(arrangement))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ["x", "gamma", "beta", "grad_out"])
@memory
def test_strides_that_differ(native, name, arrangement, memory):
    """One map lies in another way than the rest."""
    problem = away_from_kink(make_problem(channels=20, height=9, width=16, **CASES["maps"]))
    other = problem.arranged(MEMORY[memory])
    if name == "grad_out":
        other = other.changed(grad_out=arrangement(problem.grad_out))
    else:
        other = other.with_tensors(**{name: arrangement(problem.tensors[name])})
    assert_matches_reference(other)


@pytest.mark.parametrize("dimensions", EXPANSIONS.values(), ids=EXPANSIONS)
@pytest.mark.parametrize("name", ["x", "gamma", "beta", "grad_out"])
@memory
def test_expanded(native, name, dimensions, memory):
    problem = make_problem(channels=16, height=8, width=16, **CASES["maps"]).arranged(MEMORY[memory])
    if name == "grad_out":
        problem = problem.changed(grad_out=expanded(problem.grad_out, dimensions))
    else:
        problem = problem.with_tensors(**{name: expanded(problem.tensors[name], dimensions)})
    problem = away_from_kink(problem)
    if name == "x" and dimensions in ((2, 3), (0, 1, 2, 3)):
        # All that is left of the gradient is what rounding makes of zero.
        problem = problem.with_settings(eps=1.0)
    expected = expect(problem)
    actual = solve(problem, "cpu")
    if name == "x":
        size = problem.grad_out.norm().item()
        assert (actual.pop("grad_x") - expected.pop("grad_x")).norm().item() <= 1e-5 * size
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_lie_in_memory_as_x_does(native, dtype):
    problem = make_problem(channels=16, dtype=dtype, **CASES["maps"])
    for arrange in MEMORY.values():
        arranged = problem.arranged(arrange, torch.clone)
        results = solve(arranged, "cpu")
        strides = arranged.tensors["x"].stride()
        assert results["out"].stride() == results["grad_x"].stride() == strides
        assert results["grad_gamma"].stride() == results["grad_beta"].stride() == strides


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (2, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "rstd", "noise_strength"])
def test_shapes_of_numbers_per_channel(native, name, shape):
    problem = away_from_kink(make_problem(dtype=torch.float64, **{**CASES["channels"], "stats": True}))
    numbers = torch.linspace(0.3, 2.0, torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    actual = assert_matches_reference(problem.with_tensors(**{name: numbers}))
    assert actual[f"grad_{name}"].shape == shape


@pytest.mark.parametrize("wanted", ["x", "gamma", "beta", "mean", "rstd", "noise_strength"])
@pytest.mark.parametrize("case", CASES)
@memory
def test_a_gradient_does_not_depend_on_which_others_are_wanted(native, case, wanted, memory):
    problem = make_problem(channels=16, **CASES[case]).arranged(MEMORY[memory])
    if wanted in problem.tensors:
        together = solve(problem, "cpu")
        name = f"grad_{wanted}"
        assert_same_bits(solve(problem, "cpu", {wanted}), {"out": together["out"], name: together[name]})


@case
@memory
def test_gradcheck(capability, case, memory):
    """The gradients against differences of the results of the same kernels."""
    sizes = {"batch": 2, "channels": 3, "height": 2, "width": 3}
    problem = make_problem(dtype=torch.float64, **sizes, **CASES[case]).arranged(MEMORY[memory])
    assert gradcheck(torch.autograd.gradcheck, problem, "cpu")


@case
def test_gradcheck_of_the_reference(case):
    problem = make_problem(dtype=torch.float64, batch=1, channels=2, height=2, width=2, **CASES[case])
    assert gradcheck(torch.autograd.gradcheck, problem, "reference")
    assert gradcheck(torch.autograd.gradgradcheck, problem, "reference")


def gradcheck(check: Callable[..., bool], problem: Problem, name: str) -> bool:
    names = list(problem.tensors)

    def modulate(*tensors: Tensor) -> Tensor:
        arguments: dict[str, Any] = {**dict(zip(names, tensors, strict=True)), **problem.settings}
        if "mean" in arguments:
            arguments["stats"] = (arguments.pop("mean"), arguments.pop("rstd"))
        with backend(name):
            return instance_modulate(**arguments)

    return check(modulate, [tensor.detach().requires_grad_() for tensor in problem.tensors.values()])


@memory
@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_mean_that_is_large_beside_the_deviations(capability, mean, memory):
    """A float32 of that size is in steps of 0.001, or of 0.06; the numbers given are what is normalised."""
    problem = make_problem(channels=16, height=40, width=50, **CASES["maps"])
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(2, 16, 40, 50, generator=generator) + mean).contiguous()
    plain = Problem({"x": x}, {"negative_slope": 1.0}, problem.grad_out).arranged(MEMORY[memory])
    actual, expected = solve(plain, "cpu"), expect(plain)
    assert (actual["out"] - expected["out"]).abs().max().item() <= 2e-6
    assert_close(actual, expected, 1e-6)
    problem = away_from_kink(problem.with_tensors(x=x).arranged(MEMORY[memory]))
    assert_matches_reference(problem)


@memory
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (9, 7), (16, 64)], ids=str)
def test_channels_without_deviations_give_zero(capability, dtype, sizes, memory):
    """Exactly, whatever their value, so that beta is what comes out; a single pixel is such a channel."""
    values = torch.tensor([0.1, -3.7, 1e4, 0.0, 1e-6]).view(1, 5, 1, 1)
    x = MEMORY[memory](values.expand(2, 5, *sizes).to(dtype))
    beta = torch.randn(5).to(dtype)
    for unbiased in (False, True):
        out = instance_modulate(x, torch.randn(5).to(dtype), beta, negative_slope=1.0, unbiased=unbiased)
        assert torch.equal(out, beta.view(1, 5, 1, 1).expand_as(out))


@memory
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_single_pixel_is_zero(capability, dtype, memory):
    """But for what rounding leaves of a difference of equal numbers."""
    problem = make_problem(channels=16, height=1, width=1, dtype=dtype, **CASES["maps"]).with_settings(eps=1.0)
    grad_x = solve(problem.arranged(MEMORY[memory]), "cpu")["grad_x"]
    assert grad_x.abs().max().item() <= 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


@memory
def test_an_outlier_in_front(capability, memory):
    """The first pixel says nothing about the others."""
    x = torch.randn(1, 16, 30, 40, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 300.0
    problem = Problem({"x": MEMORY[memory](x)}, {"negative_slope": 1.0}, torch.randn_like(x))
    assert_matches_reference(problem)


@memory
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_channel(capability, bad, memory):
    problem = make_problem(channels=16, **CASES["channels"])
    x = problem.tensors["x"].clone()
    x[1, 3, 2, 2] = bad
    spoilt = problem.with_tensors(x=x)
    for kind in (spoilt, spoilt.with_tensors(gamma=torch.randn(2, 16, 7, 9), beta=torch.randn(2, 16, 7, 9))):
        clean = kind.with_tensors(x=problem.tensors["x"])
        actual, expected = (solve(each.arranged(MEMORY[memory]), "cpu") for each in (kind, clean))
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
    "many images": (40, 2, 3, 3),
    "many channels": (1, 700, 2, 3),
    "channels of few pixels": (2, 150, 8, 8),
    "many pixels": (1, 2, 300, 301),
}


@case
@memory
@pytest.mark.parametrize("edge", EDGES)
def test_edges(native, case, edge, memory):
    batch, channels, height, width = EDGES[edge]
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
    problem = away_from_kink(make_problem(dtype=torch.float64, **sizes, **CASES[case]))
    expected = expect(problem)
    actual = solve(problem.arranged(MEMORY[memory]), "cpu")
    if edge == "a pixel":  # of whose gradient nothing is left
        grad_x, wanted = actual.pop("grad_x"), expected.pop("grad_x")
        assert (grad_x - wanted).abs().max().item() <= 1e-10
    assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("edge", ["no images", "no channels", "no rows", "no columns", "nothing"])
def test_results_of_nothing_have_the_right_shapes(native, edge):
    batch, channels, height, width = EDGES[edge]
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
    for case in ("maps", "channels", "images"):
        problem = make_problem(**sizes, **CASES[case])
        results = solve(problem, "cpu")
        assert results["out"].shape == (batch, channels, height, width)
        for name, tensor in problem.tensors.items():
            assert results[f"grad_{name}"].shape == tensor.shape
            if name != "x":
                assert not results[f"grad_{name}"].any()


# Of few channels, whose chunks are shared out, of many, which are worked on one by one, and of many small ones, which
# are worked on in groups.
THREADED = {"few": (1, 3, 140, 250), "many": (3, 4, 182, 182), "small": (2, 70, 12, 13), "one chunk": (2, 24, 30, 40)}


@case
@memory
@pytest.mark.parametrize("sizes", THREADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(native, use_threads: Callable[[int], None], case, sizes, dtype, memory):
    batch, channels, height, width = THREADED[sizes]
    problem = make_problem(batch=batch, channels=channels, height=height, width=width, dtype=dtype, **CASES[case])
    problem = problem.arranged(MEMORY[memory])
    results = []
    for threads in (1, 2, 3):
        use_threads(threads)
        results.append(solve(problem, "cpu"))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@functools.cache
def large_problem_and_expected() -> tuple[Problem, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, gamma, beta, grad_out = (torch.randn(1, 16, 512, 528, generator=generator) for _ in range(4))
    assert x.nbytes >= 16 << 20
    norm, factor = F.instance_norm(x), 1 + gamma
    gradient = grad_out * factor
    means = [value.mean((2, 3), keepdim=True) for value in (gradient, gradient * norm)]
    rstd = (x.var((2, 3), keepdim=True, correction=0) + 1e-5).rsqrt()
    expected = {
        "out": factor * norm + beta,
        "grad_x": rstd * (gradient - means[0] - norm * means[1]),
        "grad_gamma": grad_out * norm,
        "grad_beta": grad_out,
    }
    return Problem({"x": x, "gamma": gamma, "beta": beta}, {"negative_slope": 1.0}, grad_out), expected


@memory
def test_large_results(capability, use_threads: Callable[[int], None], memory):
    """From 16 MiB on they are written past the caches."""
    problem, expected = large_problem_and_expected()
    use_threads(2)
    for name, value in solve(problem.arranged(MEMORY[memory]), "cpu").items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-4), name


@memory
@pytest.mark.parametrize("case", ["maps", "channels"])
def test_images_do_not_affect_each_other(native, case, memory):
    """Bit for bit: an image in a batch gets what it gets alone. (Noise per element depends on its place.)"""
    problem = make_problem(channels=16, **{**CASES[case], "noise": None, "strength": False})
    problem = problem.arranged(MEMORY[memory])
    together = solve(problem, "cpu")
    parts = {name: tensor for name, tensor in problem.tensors.items() if tensor.dim() == 4}
    for index in range(2):
        alone = problem.with_tensors(**{name: part[index : index + 1] for name, part in parts.items()})
        alone = alone.changed(grad_out=problem.grad_out[index : index + 1])
        names = ("out", *(f"grad_{name}" for name in parts))
        actual = solve(alone, "cpu")
        assert_same_bits({name: actual[name] for name in names}, image({n: together[n] for n in names}, index))


def test_workspace_is_a_fraction_of_the_map(native):
    """Forward keeps sums only; backward a bit for each element beside them."""

    def sizes(height: int, arrange: Callable[[Tensor], Tensor]) -> tuple[int, int]:
        x = arrange(torch.zeros(1, 64, height, 256))
        stats = torch.zeros(2, 1, 64, dtype=torch.float64)
        call = (cpu.settings(x), (x, *[None] * 7, True, False, 1e-5, 0.2), (x, stats))
        return (
            cpu.native.instance_modulate_workspace(*call),
            cpu.native.instance_modulate_backward_workspace(*call),
        )

    for arrange in MEMORY.values():
        forward, backward = sizes(1024, arrange)
        smaller_forward, smaller_backward = sizes(512, arrange)
        assert forward - smaller_forward <= 1 << 17
        elements = 64 * 512 * 256
        assert backward - smaller_backward <= elements / 4 + (1 << 17)
