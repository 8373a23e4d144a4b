"""What holds for every call of semantic_pool and semantic_modulate, on inputs made up by hypothesis and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded import (
    ALL_OPTIONS,
    BUILDERS,
    EVERYTHING,
    LABELS,
    MODULATE_OPTIONS,
    POOL_BIASES,
    POOL_RESULTS,
    Problem,
    Values,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    away_from_kink,
    channels_last,
    image,
    modulate_problem,
    pool_problem,
    solve,
)
from hypothesis import given
from hypothesis import strategies as st
from tokens import mostly, random_map

from sca_kernels import LabelMap, LatentLayout

pytestmark = pytest.mark.usefixtures("native")

operator = pytest.mark.parametrize("operator", BUILDERS)
any_memory = pytest.mark.parametrize("memory", [torch.clone, channels_last], ids=["channels first", "channels last"])


seeds = st.integers(0, 2**31 - 1)


def on_rows(name: str) -> bool:
    """Whether a result has a row for each latent."""
    rows = {"queries", "keys", "scale", "shift", "key_bias", "row_bias", "col_bias", *POOL_RESULTS[:4]}
    return name.removeprefix("grad_") in rows


@st.composite
def layouts(draw: st.DrawFn, num_labels: int) -> LatentLayout:
    return LatentLayout(tuple(draw(st.lists(st.integers(0, 9), min_size=num_labels, max_size=num_labels))))


@st.composite
def maps(draw: st.DrawFn, num_labels: int) -> LabelMap:
    """Pixels of random labels, some labels and the ignored pixels left out or not; up to two of the kernels' chunks."""
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    without = draw(st.sets(st.integers(-1, num_labels - 1), max_size=num_labels))
    batch = draw(st.sampled_from([1, 2]))
    return random_map(batch, height, width, num_labels, without=sorted(without), seed=draw(seeds))


@st.composite
def problems(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, labels: LabelMap | None = None, options: Any = None
) -> Problem:
    """Two images, all that is optional given or not."""
    if labels is None:
        labels = draw(maps(draw(st.integers(1, 6))))
    arguments: dict[str, Any] = {
        "heads": draw(st.integers(1, 2)),
        "channels": draw(st.integers(1, 20)),
        "empty": draw(st.sampled_from(["uniform", "zero"])),
        "dtype": dtype,
        "seed": draw(seeds),
    }
    layout = draw(layouts(labels.num_labels))
    if draw(st.booleans()):
        chosen = draw(st.sets(st.sampled_from(POOL_BIASES))) if options is None else options
        problem = pool_problem(labels, layout, options=sorted(chosen), **arguments)
    else:
        groups = draw(st.sets(st.sampled_from(MODULATE_OPTIONS[:-1])))
        chosen = [name for group in sorted(groups) for name in group] if options is None else list(options)
        noise = draw(st.sampled_from([None, "per_pixel", "per_element"]))
        if noise is not None and draw(st.booleans()):
            chosen.append("noise_strength")
        arguments["negative_slope"] = draw(st.sampled_from([0.2, 0.0, 1.0]))
        arguments["add_one"] = draw(st.booleans())
        if labels.height * labels.width < 4:
            arguments["eps"] = 1.0  # of few pixels little more than rounding may be left, times 1 / sqrt(eps)
        problem = modulate_problem(labels, layout, options=chosen, noise=noise, **arguments)
    memory = draw(st.sampled_from([torch.clone, channels_last]))
    return away_from_kink(problem.with_tensors(x=memory(problem.tensors["x"])))


@given(problems())
def test_native_equals_reference(problem):
    assert_matches_reference(problem, 1e-11)


@given(problems(torch.float32))
def test_repeating_changes_no_bit(problem):
    assert_same_bits(solve(problem, "cpu"), solve(problem, "cpu"))


@given(problems(), st.data())
def test_renaming_labels_changes_nothing(problem, data):
    """The latents move with their labels, the pixels stay."""
    num_labels = problem.labels.num_labels
    new_names = torch.tensor(data.draw(st.permutations(range(num_labels))))
    names = torch.cat((new_names, torch.tensor([-1])))[problem.labels.labels.long()]  # -1 takes the last
    old_names = new_names.argsort()
    latents = torch.arange(problem.layout.count).split(list(problem.layout.latents_per_label))
    order = torch.cat([latents[name] for name in old_names])

    def moved(values: Values) -> dict[str, Any]:
        return {name: value[:, :, order] if on_rows(name) else value for name, value in values.items()}

    renamed = problem.changed(
        labels=LabelMap(names.to(torch.int32), num_labels),
        layout=LatentLayout(tuple(problem.layout.latents_per_label[name] for name in old_names)),
        tensors=moved(problem.tensors),
        gradients=moved(problem.gradients),
    )
    assert_close(solve(renamed, "cpu"), moved(solve(problem, "cpu")), 1e-11)


@given(problems(torch.float32), st.integers(1, 200))
def test_labels_without_tokens_change_nothing(problem, more):
    num_labels = problem.labels.num_labels + more
    wider = problem.changed(
        labels=LabelMap(problem.labels.labels, num_labels),
        layout=LatentLayout(problem.layout.latents_per_label + (0,) * more),
    )
    assert_same_bits(solve(wider, "cpu"), solve(problem, "cpu"))


@operator
@any_memory
@pytest.mark.parametrize("labels", [LABELS, LabelMap(LABELS.labels[:1].clone(), 5)], ids=["own maps", "one map"])
def test_images_do_not_affect_each_other(capability, operator, memory, labels):
    """Bit for bit: an image in a batch gets what it gets alone."""
    problem = BUILDERS[operator](labels, channels=5, **EVERYTHING[operator])
    problem = problem.with_tensors(x=memory(problem.tensors["x"]))
    together = solve(problem, "cpu")
    for index in range(2):
        one_map = LabelMap(labels.labels[index % labels.batch : index % labels.batch + 1].clone(), 5)
        alone = problem.changed(
            labels=one_map,
            tensors=image(problem.tensors, index),
            gradients=image(problem.gradients, index),
        )
        if "noise" in problem.settings:
            alone = alone.with_settings(noise=problem.settings["noise"][index : index + 1])
        assert_same_bits(image(together, index), solve(alone, "cpu"))


@operator
@any_memory
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_image(capability, operator, memory, value):
    """In every number of one image, gradients included, they change no bit of the other."""
    problem = BUILDERS[operator](channels=5, **EVERYTHING[operator])
    problem = problem.with_tensors(x=memory(problem.tensors["x"]))

    def spoil(values: Values, names: Any) -> dict[str, Any]:
        changed = {name: tensor.clone() for name, tensor in values.items()}
        for name in names:
            changed[name][1] = value
        return changed

    clean = solve(problem, "cpu")
    for names in ([], *([name] for name in problem.tensors), list(problem.tensors)):
        spoiled = problem.changed(tensors=spoil(problem.tensors, names))
        if not names:
            spoiled = spoiled.changed(gradients=spoil(problem.gradients, problem.gradients))
        results = solve(spoiled, "cpu")
        assert_same_bits(image(results, 0), image(clean, 0))
        changed = [name for name in results if not torch.equal(results[name][1], clean[name][1])]
        assert changed, names
    if "noise" in problem.settings:
        noise = spoil(problem.settings, ["noise"])["noise"]
        assert_same_bits(image(solve(problem.with_settings(noise=noise), "cpu"), 0), image(clean, 0))


# Not on the reference, whose dense product multiplies the features of other labels by zero.
@any_memory
def test_nan_in_a_pixel(capability, operator_problem, memory):
    """It reaches the channel's statistics and the latents of its label, or nothing but itself where they are given."""
    problem, kept = operator_problem
    x = memory(problem.tensors["x"])
    clean = solve(problem.with_tensors(x=x), "cpu", wanted=())
    x[0, :, 3, 4] = torch.nan
    spoiled = solve(problem.with_tensors(x=x), "cpu", wanted=())
    for name, keeps in kept.items():
        before, after = clean[name], spoiled[name]
        assert torch.equal(before[1], after[1]), name
        assert torch.equal(before[0].masked_fill(~keeps, 0), after[0].masked_fill(~keeps, 0)), name
        assert after[0][(~keeps).expand_as(after[0])].isnan().all(), name


@pytest.fixture(params=BUILDERS)
def operator_problem(request: pytest.FixtureRequest) -> tuple[Problem, dict[str, Any]]:
    """A call, and for each of its results which elements a NaN in pixel (3, 4) must not reach."""
    label = LABELS.labels[0, 3, 4]
    assert label in (0, 1, 3, 4)
    if request.param == "semantic_pool":
        problem = pool_problem(channels=5, empty="zero")
        kept = problem.layout.labels(torch.device("cpu")) != label
        return problem, {"pooled": kept[:, None].expand(11, 5), "lse": kept.expand(2, 11)}
    problem = modulate_problem(channels=5, options=("mean", "rstd"))
    kept = torch.ones(5, 7, 9, dtype=torch.bool)
    kept[:, 3, 4] = False
    return problem, {"out": kept}


@pytest.mark.parametrize(
    ("operator", "noise"),
    [("semantic_pool", None), ("semantic_modulate", "per_pixel"), ("semantic_modulate", "per_element")],
)
@any_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_threads_change_no_bit(capability, use_threads: Callable[[int], None], operator, noise, memory, dtype):
    labels = mostly(1, random_map(2, 28, 31, 3))
    options = {} if noise is None else {"noise": noise, "options": (*ALL_OPTIONS[:5], "noise_strength")}
    problem = BUILDERS[operator](labels, LatentLayout((5, 0, 9)), channels=21, dtype=dtype, **options)
    problem = problem.with_tensors(x=memory(problem.tensors["x"]))
    results = []
    for threads in (1, 2, 3, 2):
        use_threads(threads)
        # A map of its own, so that its plan is made with these threads too.
        results.append(solve(problem.changed(labels=LabelMap(labels.labels.clone(), 3)), "cpu"))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@operator
@any_memory
@pytest.mark.parametrize("gradient_memory", [torch.clone, channels_last], ids=["gradient first", "gradient last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [5, 16, 64])
def test_nothing_that_is_given_is_written_to(operator, memory, gradient_memory, dtype, channels):
    """Not even where a row of it has just the form that the kernels work in."""
    problem = BUILDERS[operator](channels=channels, dtype=dtype, **EVERYTHING[operator])
    gradients = {
        name: gradient_memory(gradient) if gradient.dim() == 4 else gradient
        for name, gradient in problem.gradients.items()
    }
    problem = problem.with_tensors(x=memory(problem.tensors["x"])).changed(gradients=gradients)
    given_tensors = {**problem.tensors, **{f"grad_{name}": gradient for name, gradient in gradients.items()}}
    given_tensors["labels"] = problem.labels.labels
    if "noise" in problem.settings:
        given_tensors["noise"] = problem.settings["noise"]
    before = {name: tensor.clone() for name, tensor in given_tensors.items()}
    solve(problem, "cpu")
    assert_same_bits(given_tensors, before)


@operator
def test_one_map_for_all_images_is_that_map_for_each(operator):
    first = LABELS.labels[:1]
    shared, repeated = (BUILDERS[operator](LabelMap(first.expand(images, -1, -1).contiguous(), 5)) for images in (1, 2))
    assert_same_bits(solve(shared, "cpu"), solve(repeated, "cpu"))


any_label = st.one_of(
    st.integers(-3, 8),
    st.sampled_from([-(2**31), -(2**31) + 1, 2**31 - 1, 2**16, 255]),
    st.integers(-(2**31), 2**31 - 1),
)


@given(st.data())
def test_any_value_of_a_label_is_a_label_or_ignored(data):
    """Values that no check has seen, as on a GPU: one out of range counts as ignored and is never an address."""
    num_labels, height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9))
    count = 2 * height * width
    values = torch.tensor(data.draw(st.lists(any_label, min_size=count, max_size=count)), dtype=torch.int32)
    labels = LabelMap(values.view(2, height, width), num_labels)
    problem = data.draw(problems(labels=labels))
    in_range = (labels.labels >= 0) & (labels.labels < num_labels)
    checked = problem.changed(labels=LabelMap(torch.where(in_range, labels.labels, -1), num_labels))
    actual = assert_matches_reference(problem, 1e-11)
    assert_same_bits(actual, solve(checked, "cpu"))


@operator
def test_labels_written_after_the_plan_was_made(operator):
    """They count, those out of range as ignored ones, unless they were written unseen: then the plan holds."""
    problem = BUILDERS[operator](LabelMap(LABELS.labels.clone(), 5), channels=5)
    before = solve(problem, "cpu")
    planned = problem.labels.planned()
    unseen = planned.labels.numpy()  # which does not count the versions of the tensor
    unseen[:] = 2**30
    assert_same_bits(solve(problem.changed(labels=planned), "cpu"), before)
    problem.labels.labels.random_(-(2**31), 2**31 - 1)
    problem.labels.labels[:, ::2].random_(-1, 6)
    actual = assert_matches_reference(problem)
    assert any(not torch.equal(actual[name], before[name]) for name in actual)
    problem.labels.labels.fill_(2**31 - 1)
    assert_matches_reference(problem)


@operator
def test_a_map_at_another_resolution(operator):
    """What ``at`` returns is taken as any other map."""
    resized = LABELS.at(5, 12)
    problem = BUILDERS[operator](resized, channels=5)
    assert_same_bits(solve(problem, "cpu"), solve(problem.changed(labels=LabelMap(resized.labels.clone(), 5)), "cpu"))
    assert_matches_reference(away_from_kink(problem))


def test_masses_are_those_of_a_softmax():
    """They sum to one in rows and in columns, and a constant feature is pooled to itself."""
    problem = pool_problem(channels=5, dtype=torch.float64, empty="uniform")
    x = problem.tensors["x"].clone()
    x[:, 2] = 7.5
    results = solve(problem.with_tensors(x=x), "cpu", wanted=())
    for name in ("row_mass", "col_mass"):
        torch.testing.assert_close(results[name].sum(3), torch.ones(2, 2, 11, dtype=torch.float64))
    torch.testing.assert_close(results["pooled"][..., 2], torch.full((2, 2, 11), 7.5, dtype=torch.float64))
    assert tuple(results)[: len(POOL_RESULTS)] == POOL_RESULTS
