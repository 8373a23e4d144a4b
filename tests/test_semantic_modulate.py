"""Semantic modulation on the compiled kernels against the reference: the result and every gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from folded import (
    ALL_OPTIONS,
    ARRANGEMENTS,
    DTYPES,
    EDGES,
    EXPANSIONS,
    MEMORY,
    MODULATE_RULES,
    MODULATE_VARIANTS,
    Problem,
    Values,
    apply,
    arranged,
    assert_accurate,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    away_from_kink,
    expanded,
    expect,
    few_pixels_eps,
    modulate_problem,
    solve,
)
from tokens import TOLERANCE, error_ratio, label_map, random_map
from torch import Tensor

import sca_kernels
from sca_kernels import LatentLayout, semantic_modulate

any_memory = pytest.mark.parametrize("memory", MEMORY)


@functools.cache
def variant_and_expected(variant: str, rule: str) -> tuple[Problem, Values]:
    problem = modulate_problem(channels=5, dtype=torch.float64, **MODULATE_VARIANTS[variant], **MODULATE_RULES[rule])
    problem = away_from_kink(problem)
    return problem, expect(problem)


@pytest.mark.parametrize("variant", MODULATE_VARIANTS)
@pytest.mark.parametrize("rule", MODULATE_RULES)
def test_variants(capability, variant, rule):
    """In float64, where nothing is small enough to go unnoticed; half of them in each of the two orders of memory."""
    problem, expected = variant_and_expected(variant, rule)
    memory = list(MEMORY)[(list(MODULATE_VARIANTS).index(variant) + list(MODULATE_RULES).index(rule)) % 2]
    assert_close(solve(arranged(problem, memory), "cpu"), expected, TOLERANCE[torch.float64])


@functools.cache
def problem_and_expected(heads: int, channels: int, dtype: torch.dtype) -> tuple[Problem, Values]:
    variant = list(MODULATE_VARIANTS.values())[channels % 4 - 4]
    rule = list(MODULATE_RULES.values())[channels % 3]
    problem = away_from_kink(modulate_problem(heads=heads, channels=channels, dtype=dtype, **variant, **rule))
    return problem, expect(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5, 16, 40, 64, 129])
@pytest.mark.parametrize("heads", [1, 3])
@any_memory
def test_matches_reference(capability, dtype, channels, heads, memory):
    """Single channels, odd numbers, parts of a vector and whole vectors of every instruction set."""
    problem, expected = problem_and_expected(heads, channels, dtype)
    problem = arranged(problem, memory, gradient_memory=list(MEMORY)[heads // 2])
    assert_accurate(problem, solve(problem, "cpu"), expected)


@functools.cache
def size_and_expected(height: int, width: int, channels: int) -> tuple[Problem, Values]:
    variant = MODULATE_VARIANTS["everything but statistics"]
    problem = modulate_problem(
        random_map(2, height, width, 3),
        LatentLayout((2, 5, 0)),
        channels=channels,
        **variant,
        eps=few_pixels_eps(height, width),
    )
    problem = away_from_kink(problem)
    return problem, expect(problem)


@pytest.mark.parametrize("size", [(1, 2), (1, 37), (37, 1), (7, 9), (20, 33), (64, 40), (16, 256), (1, 4500)], ids=str)
@pytest.mark.parametrize("channels", [20, 64])
@any_memory
def test_sizes(capability, size, channels, memory):
    problem, expected = size_and_expected(*size, channels)
    assert_close(solve(arranged(problem, memory), "cpu"), expected, TOLERANCE[torch.float32])


@functools.cache
def edge_and_expected(edge: str, empty: str, channels: int) -> tuple[Problem, Values]:
    labels, layout, batch = EDGES[edge]
    given = ("empty_scale", "empty_shift") if empty == "given" else ()
    settings = {} if empty == "given" else {"empty": empty}
    settings["eps"] = few_pixels_eps(labels.height, labels.width)
    problem = modulate_problem(
        labels, layout, batch=batch, channels=channels, options=("key_bias", "col_bias", *given), **settings
    )
    problem = away_from_kink(problem)
    return problem, expect(problem)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    ("empty", "memory"),
    [
        ("uniform", "channels first"),
        ("uniform", "channels last"),
        ("zero", "channels last"),
        ("given", "channels first"),
    ],
)
@pytest.mark.parametrize("channels", [7, 64])
def test_edge_cases(capability, edge, empty, memory, channels):
    problem, expected = edge_and_expected(edge, empty, channels)
    assert_close(solve(arranged(problem, memory), "cpu"), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("wanted", ["x", "keys", "scale", "shift", *ALL_OPTIONS])
@pytest.mark.parametrize("noise", ["per_pixel", "per_element"])
def test_gradient_of_one_input(native, wanted, noise):
    problem = modulate_problem(channels=5, options=ALL_OPTIONS, noise=noise)
    alone, together = solve(problem, "cpu", wanted={wanted}), solve(problem, "cpu")
    kept = {"out", f"grad_{wanted}"}
    assert_close(alone, {name: value if name in kept else None for name, value in together.items()}, 1e-6)


@pytest.mark.parametrize("statistics", ["given", "computed"])
def test_gradcheck(capability, statistics):
    """The gradients against differences of the result of the same kernels."""
    labels, layout = label_map([[0, 0, 1], [2, -1, 0]], 4), LatentLayout((2, 0, 1, 1))
    variant = MODULATE_VARIANTS[
        "everything and noise per element" if statistics == "given" else "everything but statistics"
    ]
    problem = modulate_problem(labels, layout, batch=1, channels=2, dtype=torch.float64, **variant)
    if statistics == "computed":
        problem = problem.without_tensors("empty_scale", "empty_shift")
    names = tuple(problem.tensors)

    def modulate(*inputs: Tensor) -> Tensor:
        with sca_kernels.backend("cpu"):
            return apply(problem, dict(zip(names, inputs, strict=True)))["out"]

    assert torch.autograd.gradcheck(modulate, [tensor.requires_grad_() for tensor in problem.tensors.values()])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_meaning_on_paper(native, backend):
    """Numbers small enough to be worked out by hand."""
    labels, layout = label_map([[0, 1, -1, 2]], 3), LatentLayout((2, 1, 0))
    x = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 1, 4)
    table = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    # Weights of label 0: 1 / 4 and 3 / 4.
    key_bias = torch.tensor([1.0, 3.0, 5.0]).log().view(1, 1, 3)
    arguments = {"key_bias": key_bias, "stats": (torch.tensor(3.0), torch.tensor(0.5)), "negative_slope": 0.1}
    row = torch.tensor([10.0])

    def modulate(**settings: Any) -> list[float]:
        with sca_kernels.backend(backend):
            return (
                semantic_modulate(x, table * 0, table, 2 * table, layout, labels, **arguments, **settings)
                .flatten()
                .tolist()
            )

    # n = -1, 0, 1, 2; sums of scale: 1.75, 6 and, of those without latents, the mean 3; of shift twice that.
    assert modulate() == pytest.approx([-2.75 + 3.5, 12.0, 4.0 + 6, 8.0 + 6])
    assert modulate(add_one=False) == pytest.approx([-1.75 + 3.5, 12.0, 3.0 + 6, 6.0 + 6])
    assert modulate(empty="zero") == pytest.approx([0.75, 12.0, 1.0, 2.0])
    assert modulate(empty_scale=row, empty_shift=-row) == pytest.approx([0.75, 12.0, 11.0 - 10, 22.0 - 10])
    assert modulate(scale_bias=row, shift_bias=-row) == pytest.approx([-1.925, 2.0, 14.0 + 6 - 10, 28.0 + 6 - 10])
    noise = torch.tensor([-2.0, 0.0, 1.0, 0.0])
    assert modulate(noise=noise) == pytest.approx([-0.125, 12.0, 11.0, 14.0])
    assert modulate(noise=noise, noise_strength=row) == pytest.approx([-1.925, 12.0, 20.0, 14.0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_heads_are_summed(native, backend):
    """In the sums and in the mean that stands in for them: twice the same head is twice the rows."""
    one = modulate_problem(heads=1, channels=5, dtype=torch.float64)
    halved = {name: one.tensors[name] / 2 for name in ("scale", "shift")}
    names = ("keys", "scale", "shift", "key_bias", "row_bias", "col_bias")
    two = one.with_tensors(**{name: {**one.tensors, **halved}[name].repeat_interleave(2, 1) for name in names})
    results = [solve(problem, backend) for problem in (one, two)]
    for name in ("out", "grad_x"):
        torch.testing.assert_close(results[1][name], results[0][name])


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(capability, arrangement, dtype):
    for channels in (64, 5):
        problem = away_from_kink(modulate_problem(channels=channels, dtype=dtype))
        expected = expect(problem)
        x, gradient = (arrangement(tensor) for tensor in (problem.tensors["x"], problem.gradients["out"]))
        for x_or_not, gradient_or_not in (
            (x, gradient),
            (x, problem.gradients["out"]),
            (problem.tensors["x"], gradient),
        ):
            these = problem.with_tensors(x=x_or_not).with_gradients(out=gradient_or_not)
            assert_accurate(these, solve(these, "cpu"), expected)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_expanded(capability, expansion):
    """Without an activation, whose kink an expanded gradient could not keep away from.

    Where all pixels are the same, their own statistics would leave nothing but rounding.
    """
    statistics = ("mean", "rstd") if expansion in ("pixel", "number") else ()
    for channels in (64, 5):
        problem = modulate_problem(channels=channels, options=("scale_bias", *statistics), negative_slope=1.0)
        x, gradient = (
            expanded(tensor, EXPANSIONS[expansion]) for tensor in (problem.tensors["x"], problem.gradients["out"])
        )
        assert_matches_reference(problem.with_tensors(x=x).with_gradients(out=gradient))
        assert_matches_reference(problem.with_gradients(out=gradient))


@any_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_results_lie_in_memory_as_x_does(native, memory, dtype):
    problem = arranged(modulate_problem(channels=8, dtype=dtype), memory, gradient_memory="channels last")
    results = solve(problem, "cpu")
    assert results["out"].stride() == results["grad_x"].stride() == problem.tensors["x"].stride()


def test_strides_of_tables(capability):
    problem = modulate_problem(channels=8, options=ALL_OPTIONS, noise="per_pixel", negative_slope=1.0)

    def rearranged(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (rearranged, lambda tensor: tensor[:1].expand_as(tensor)):
        tensors = {name: change(tensor) for name, tensor in problem.tensors.items() if name != "x"}
        assert_matches_reference(problem.with_tensors(**tensors))


def test_pixels_without_latents(capability):
    """What their place is taken by, and where its gradient goes."""
    labels, layout = label_map([[0, 1, 1, -1, 2]], 3), LatentLayout((2, 0, 3))
    problem = modulate_problem(labels, layout, batch=1, channels=4, dtype=torch.float64, options=(), negative_slope=1.0)
    masked = problem.gradients["out"].clone()
    masked[..., 1:4] = 0
    of_others = problem.with_gradients(out=masked)
    stats = (torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    problem, of_others = (these.with_tensors(mean=stats[0], rstd=stats[1]) for these in (problem, of_others))
    gradient = (problem.gradients["out"] - masked).sum(3)
    scaled = ((problem.gradients["out"] - masked) * problem.tensors["x"]).sum(3)
    uniform, zero = (solve(problem.with_settings(empty=empty), "cpu") for empty in ("uniform", "zero"))
    others = solve(of_others, "cpu")
    for name, share in (("grad_scale", scaled), ("grad_shift", gradient)):
        torch.testing.assert_close(zero[name], others[name])
        torch.testing.assert_close(uniform[name] - zero[name], (share / 5).view(1, 1, 1, 4).expand(1, 2, 5, 4))
    given = problem.with_tensors(
        empty_scale=torch.randn(4, dtype=torch.float64), empty_shift=torch.randn(4, dtype=torch.float64)
    )
    results = [solve(given.with_settings(empty=empty), "cpu") for empty in ("uniform", "zero")]
    assert_same_bits(*results)
    torch.testing.assert_close(results[0]["grad_empty_scale"], scaled.flatten())
    torch.testing.assert_close(results[0]["grad_empty_shift"], gradient.flatten())
    torch.testing.assert_close(results[0]["grad_scale"], others["grad_scale"])


@any_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits(capability, memory, dtype):
    """Logits of up to 10,000, whole numbers so that they are exact: e to their power is far out of range."""
    problem = modulate_problem(channels=4, dtype=dtype, negative_slope=1.0, eps=1.0)
    generator = torch.Generator().manual_seed(3)
    random = {name: torch.randint(-50, 51, problem.tensors[name].shape, generator=generator) for name in ("keys", "x")}
    biases = {name: 8 * problem.tensors[name].round() for name in ("key_bias", "row_bias", "col_bias")}
    for sign in (None, 1, -1):
        tensors = (
            random
            if sign is None
            else {"keys": torch.full_like(random["keys"], 50 * sign), "x": random["x"].sign() * 50}
        )
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
        these = arranged(problem.with_tensors(**tensors, **biases), memory)
        # Where a weight is one but for rounding, little else is left of the gradient of its logit.
        assert_accurate(these, solve(these, "cpu"), expect(these), ill_conditioned=True)


@any_memory
def test_minus_infinity_forbids_a_latent(capability, memory):
    """A logit of -inf beside finite ones is a weight of zero."""
    labels, layout = random_map(2, 20, 33, 3), LatentLayout((2, 3, 2))
    problem = modulate_problem(labels, layout, channels=5)
    key_bias, row_bias = problem.tensors["key_bias"].clone(), problem.tensors["row_bias"].clone()
    key_bias[:, 0, 0] = -torch.inf
    row_bias[:, :, 3, ::2] = -torch.inf
    problem = away_from_kink(arranged(problem.with_tensors(key_bias=key_bias, row_bias=row_bias), memory))
    actual = assert_matches_reference(problem)
    assert not actual["grad_key_bias"][:, 0, 0].any() and not actual["grad_row_bias"][:, :, 3, ::2].any()


@functools.cache
def large_problem_and_expected() -> tuple[Problem, Values]:
    labels = random_map(1, 256, 256, 4, without=[2])
    problem = modulate_problem(labels, LatentLayout((2, 3, 1, 0)), batch=1, heads=1, channels=64)
    problem = away_from_kink(problem)
    return problem, expect(problem)


@pytest.mark.slow_under_sanitizer
@any_memory
def test_large_feature_map(capability, use_threads, memory):
    """A result of 16 MiB, which may be written in another way than a small one, by two threads."""
    problem, expected = large_problem_and_expected()
    use_threads(2)
    out = solve(arranged(problem, memory), "cpu", wanted=())["out"]
    assert error_ratio(out, expected["out"]) <= TOLERANCE[torch.float32]


@pytest.mark.slow_under_sanitizer
@any_memory
def test_gradients_of_a_large_feature_map(native, use_threads, memory):
    problem, expected = large_problem_and_expected()
    use_threads(2)
    assert_close(solve(arranged(problem, memory, memory), "cpu"), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 2, 0)], ids=["no images", "no channels"])
@pytest.mark.parametrize("variant", ["nothing", "everything", "everything and noise per element"])
def test_nothing_of_a_kind(native, sizes, variant):
    batch, heads, channels = sizes
    labels = random_map(1, 3, 4, 2)
    problem = modulate_problem(
        labels, LatentLayout((2, 1)), batch=batch, heads=heads, channels=channels, **MODULATE_VARIANTS[variant]
    )
    assert_matches_reference(away_from_kink(problem))


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match="keys: expected at least one head"):
        solve(modulate_problem(random_map(1, 3, 4, 2), LatentLayout((2, 1)), batch=1, heads=0), "reference")
