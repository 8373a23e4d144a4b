"""What holds for every input of semantic cross-attention, on inputs made up by hypothesis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokens import (
    COMBINATIONS,
    Problem,
    Results,
    Tokens,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    combine,
    error_ratio,
    make_problem,
    mostly,
    random_map,
    solve,
)
from torch import Tensor

from sca_kernels import LabelMap, LatentLayout

pytestmark = pytest.mark.usefixtures("native")

combination = pytest.mark.parametrize("combination", COMBINATIONS)

seeds = st.integers(0, 2**31 - 1)
empties = st.sampled_from(["uniform", "zero"])


@st.composite
def layouts(draw: st.DrawFn, num_labels: int) -> LatentLayout:
    return LatentLayout(tuple(draw(st.lists(st.integers(0, 9), min_size=num_labels, max_size=num_labels))))


@st.composite
def maps(draw: st.DrawFn, num_labels: int, batch: int = 2) -> LabelMap:
    """Pixels of random labels, some labels and the ignored pixels left out or not; up to two of the kernels' chunks."""
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    without = draw(st.sets(st.integers(-1, num_labels - 1), max_size=num_labels))
    return random_map(batch, height, width, num_labels, without=sorted(without), seed=draw(seeds))


@st.composite
def problems(draw: st.DrawFn, sides: str = "any", dtype: torch.dtype = torch.float64) -> Problem:
    num_labels = draw(st.integers(1, 6))
    if sides == "any":
        sides = draw(st.sampled_from(sorted(COMBINATIONS)))
    tokens = [draw(maps(num_labels) if side == "pixel" else layouts(num_labels)) for side in sides.split("-")]
    return make_problem(
        *tokens,
        heads=draw(st.integers(1, 2)),
        key_width=draw(st.integers(1, 20)),
        value_width=draw(st.integers(1, 20)),
        dtype=dtype,
        seed=draw(seeds),
    )


@given(problems(), empties, st.floats(-2, 2, width=32))
def test_native_equals_reference(problem, empty, scale):
    assert_matches_reference(problem, empty=empty, scale=scale)


def permuted(problem: Problem, side: str, order: Tensor, tokens: Tokens) -> Problem:
    """The tokens of one side in another order, so that token i of the result is token order[i] of the problem."""
    names = ("query", "grad_out", "grad_lse") if side == "query" else ("key", "value")
    changes = {name: getattr(problem, name)[:, :, order] for name in names}
    return problem.changed(**changes, **{f"{side}_tokens": tokens})


def permuted_results(results: Results, side: str, order: Tensor) -> Results:
    names = ("out", "lse", "grad_query") if side == "query" else ("grad_key", "grad_value")
    return results._replace(**{name: getattr(results, name)[:, :, order] for name in names})


@given(st.data(), st.sampled_from(["query", "key"]), empties)
def test_permuting_pixels_permutes_the_results(data, side, empty):
    other = data.draw(st.sampled_from(["pixel", "latent"]))
    problem = data.draw(problems(f"pixel-{other}" if side == "query" else f"{other}-pixel"))
    pixels = problem.query_tokens if side == "query" else problem.key_tokens
    assert isinstance(pixels, LabelMap)
    order = torch.randperm(pixels.height * pixels.width, generator=torch.Generator().manual_seed(data.draw(seeds)))
    moved = LabelMap(pixels.labels.flatten(1)[:, order].view_as(pixels.labels), pixels.num_labels)
    actual = solve(permuted(problem, side, order, moved), "cpu", empty=empty)
    expected = permuted_results(solve(problem, "cpu", empty=empty), side, order)
    assert_close(actual, expected, 1e-12)


@given(st.data(), empties)
def test_renaming_labels_changes_nothing(data, empty):
    """The latents move with their labels, the pixels stay."""
    problem = data.draw(problems())
    renamed = problem
    num_labels = problem.query_tokens.num_labels
    new_names = torch.tensor(data.draw(st.permutations(range(num_labels))))
    orders = {}
    for side in ("query", "key"):
        tokens = getattr(problem, f"{side}_tokens")
        if isinstance(tokens, LabelMap):
            names = torch.cat((new_names, torch.tensor([-1])))[tokens.labels.long()]  # -1 takes the last
            other = LabelMap(names.to(torch.int32), num_labels)
            orders[side] = torch.arange(tokens.height * tokens.width)
        else:
            old_names = new_names.argsort()
            other = LatentLayout(tuple(tokens.latents_per_label[name] for name in old_names))
            latents = torch.arange(tokens.count).split(list(tokens.latents_per_label))
            orders[side] = torch.cat([latents[name] for name in old_names])
        renamed = permuted(renamed, side, orders[side], other)
    expected = solve(problem, "cpu", empty=empty)
    for side, order in orders.items():
        expected = permuted_results(expected, side, order)
    assert_close(solve(renamed, "cpu", empty=empty), expected, 1e-12)


def with_labels(tokens: Tokens, num_labels: int, latents: int = 0) -> Tokens:
    """The same tokens among more labels, each of which has some latents more if there are any."""
    if isinstance(tokens, LabelMap):
        return LabelMap(tokens.labels, num_labels)
    return LatentLayout(tokens.latents_per_label + (latents,) * (num_labels - tokens.num_labels))


@given(problems(), st.integers(1, 200), empties)
def test_labels_without_tokens_change_nothing(problem, more, empty):
    num_labels = problem.query_tokens.num_labels + more
    wider = problem.changed(
        query_tokens=with_labels(problem.query_tokens, num_labels),
        key_tokens=with_labels(problem.key_tokens, num_labels),
    )
    assert_same_bits(solve(wider, "cpu", empty=empty), solve(problem, "cpu", empty=empty))


@given(problems("pixel-latent"), st.integers(1, 4), empties)
def test_keys_of_labels_without_queries_change_nothing(problem, latents, empty):
    """With "uniform" only where no query is without keys: such a query takes the mean of all values."""
    if empty == "uniform":
        labels = problem.query_tokens.labels.clamp(min=0)
        layout = LatentLayout(tuple(latents + 1 for latents in problem.key_tokens.latents_per_label))
        heads, width = problem.query.shape[1], problem.query.shape[3]
        pixels = LabelMap(labels, layout.num_labels)
        problem = make_problem(pixels, layout, heads=heads, key_width=width, dtype=torch.float64)
    plain = solve(problem, "cpu", empty=empty)
    layout = problem.key_tokens
    num_labels = layout.num_labels + 2
    key_tokens = with_labels(layout, num_labels, latents)
    assert isinstance(key_tokens, LatentLayout)
    added = key_tokens.count - layout.count
    more_keys, more_values = (
        torch.cat((tensor, tensor.new_full((*tensor.shape[:2], added, tensor.shape[3]), 7.0)), 2)
        for tensor in (problem.key, problem.value)
    )
    wider = problem.changed(
        key=more_keys,
        value=more_values,
        query_tokens=with_labels(problem.query_tokens, num_labels),
        key_tokens=key_tokens,
    )
    actual = solve(wider, "cpu", empty=empty)
    assert not actual.grad_key[:, :, layout.count :].any() and not actual.grad_value[:, :, layout.count :].any()
    first = (gradient[:, :, : layout.count] for gradient in (actual.grad_key, actual.grad_value))
    assert_close(Results(*actual[:3], *first), plain, 1e-12)


@given(problems(), empties)
def test_images_do_not_affect_each_other(problem, empty):
    """Bit for bit: an image in a batch gets what it gets alone."""
    together = solve(problem, "cpu", empty=empty)
    for image in range(2):
        names = ("query", "key", "value", "grad_out", "grad_lse")
        alone = problem.changed(**{name: getattr(problem, name)[image : image + 1] for name in names})
        for side in ("query_tokens", "key_tokens"):
            tokens = getattr(problem, side)
            if isinstance(tokens, LabelMap):
                one = LabelMap(tokens.labels[image : image + 1], tokens.num_labels)
                alone = alone.changed(**{side: one})
        expected = solve(alone, "cpu", empty=empty)
        assert_same_bits(Results(*(result[image : image + 1] for result in together)), expected)


@given(problems(dtype=torch.float32), empties)
def test_repeating_changes_no_bit(problem, empty):
    assert_same_bits(solve(problem, "cpu", empty=empty), solve(problem, "cpu", empty=empty))


@combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_threads_change_no_bit(capability, use_threads: Callable[[int], None], combination, dtype):
    pixels, more_pixels = mostly(1, random_map(2, 28, 31, 3)), random_map(2, 20, 21, 3, seed=5)
    latents, more_latents = LatentLayout((5, 0, 9)), LatentLayout((0, 3, 2))
    query_tokens, key_tokens = combine(combination, pixels, more_pixels, latents, more_latents)
    problem = make_problem(query_tokens, key_tokens, key_width=16, value_width=8, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 2):
        use_threads(threads)
        # A map of its own, so that its plan is made with these threads too.
        fresh = {
            side: LabelMap(tokens.labels, tokens.num_labels)
            for side in ("query_tokens", "key_tokens")
            if isinstance(tokens := getattr(problem, side), LabelMap)
        }
        results.append(solve(problem.changed(**fresh), "cpu"))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@combination
def test_a_gradient_does_not_depend_on_which_others_are_wanted(combination, wanted):
    problem = make_problem(*COMBINATIONS[combination], key_width=16, value_width=8)
    alone, together = solve(problem, "cpu", wanted=wanted), solve(problem, "cpu")
    asked = (gradient if flag else None for gradient, flag in zip(together[2:], wanted, strict=True))
    assert_close(alone, Results(*together[:2], *asked), 1e-6)


any_label = st.one_of(
    st.integers(-3, 8),
    st.sampled_from([-(2**31), -(2**31) + 1, 2**31 - 1, 2**16, 255]),
    st.integers(-(2**31), 2**31 - 1),
)


@given(st.data(), st.sampled_from(["pixel-latent", "latent-pixel", "pixel-pixel"]), empties)
def test_any_value_of_a_label_is_a_label_or_ignored(data, sides, empty):
    """Values that no check has seen, as on a GPU: one out of range counts as ignored and is never an address."""
    num_labels, height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))

    def pixels() -> LabelMap:
        count = 2 * height * width
        values = data.draw(st.lists(any_label, min_size=count, max_size=count))
        return LabelMap(torch.tensor(values, dtype=torch.int32).view(2, height, width), num_labels)

    tokens = [pixels() if side == "pixel" else data.draw(layouts(num_labels)) for side in sides.split("-")]
    problem = make_problem(*tokens)
    checked = problem
    for side, given_tokens in zip(("query_tokens", "key_tokens"), tokens, strict=True):
        if isinstance(given_tokens, LabelMap):
            labels = given_tokens.labels
            in_range = (labels >= 0) & (labels < num_labels)
            checked = checked.changed(**{side: LabelMap(torch.where(in_range, labels, -1), num_labels)})
    actual = assert_matches_reference(problem, empty=empty)
    assert_same_bits(actual, solve(checked, "cpu", empty=empty))


@given(st.data())
def test_labels_written_after_use_count(data):
    """A plan is made anew once the labels are written to."""
    problem = data.draw(problems("pixel-latent", dtype=torch.float32))
    assert isinstance(problem.query_tokens, LabelMap)
    solve(problem, "cpu")
    problem.query_tokens.labels.random_(-1, problem.query_tokens.num_labels + 1)
    assert_matches_reference(problem)


@given(st.data(), st.sampled_from(["pixel-pixel", "latent-pixel"]))
def test_results_over_parts_of_the_keys_merge(data, sides):
    """With lse, two results over disjoint keys make up the result over both."""
    problem = data.draw(problems(sides)).changed(grad_out=None, grad_lse=None)
    pixels = problem.key_tokens
    assert isinstance(pixels, LabelMap)
    in_first = torch.rand(pixels.labels.shape, generator=torch.Generator().manual_seed(data.draw(seeds))) < 0.5
    first, second = (
        solve(
            problem.changed(key_tokens=LabelMap(torch.where(part, pixels.labels, -1), pixels.num_labels)),
            "cpu",
            empty="zero",
        )
        for part in (in_first, ~in_first)
    )
    whole = solve(problem, "cpu", empty="zero")
    lse = torch.logaddexp(first.lse, second.lse)
    assert error_ratio(lse, whole.lse) <= 1e-12
    weights = ((part.lse - lse).exp().nan_to_num(nan=0).unsqueeze(-1) for part in (first, second))
    merged = sum(weight * part.out for weight, part in zip(weights, (first, second), strict=True))
    assert error_ratio(merged, whole.out) <= 1e-12


@given(problems(), st.floats(-3, 3, width=32))
def test_shifting_values_shifts_the_output(problem, shift):
    """The weights of a query sum to one, whether it has keys or takes the mean of all."""
    keys = problem.key.shape[2]
    shifted = solve(problem.changed(value=problem.value + shift), "cpu")
    plain = solve(problem, "cpu")
    expected = plain.out + shift if keys else plain.out
    assert error_ratio(shifted.out, expected) <= 1e-12
    assert_same_bits(Results(plain.out, shifted.lse, *(None,) * 3), Results(plain.out, plain.lse, *(None,) * 3))
