"""Selections of the latents of present labels, by themselves and in place of their layout in the operators."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from folded import (
    BUILDERS,
    LABELS,
    LAYOUT,
    MAPS,
    POOL_RESULTS,
    Problem,
    Values,
    apply,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    away_from_kink,
    channels_last,
    expect,
    modulate_problem,
    pool_problem,
    solve,
)
from hypothesis import given
from hypothesis import strategies as st
from tokens import TOLERANCE, label_map, random_map
from torch import Tensor
from torch.utils import _pytree as pytree

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, LatentSelection, semantic_pool

operator = pytest.mark.parametrize("operator", BUILDERS)
either_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])

any_map = pytest.mark.parametrize("labels", MAPS)


def selected_by_hand(layout: LatentLayout, labels: LabelMap) -> tuple[list[list[int]], list[list[int]]]:
    """The latents of each image, and the prefix sums of how many each label has."""
    latents, sums = [], []
    for image in labels.labels:
        present = set(image.flatten().tolist())
        latents.append([])
        sums.append([0])
        for label, (begin, end) in enumerate(zip(layout.cu_latents, layout.cu_latents[1:], strict=False)):
            latents[-1] += range(begin, end) if label in present else ()
            sums[-1].append(len(latents[-1]))
    return latents, sums


def assert_selects(selection: LatentSelection, layout: LatentLayout, labels: LabelMap) -> None:
    latents, sums = selected_by_hand(layout, labels)
    assert selection.layout == layout and selection.num_labels == layout.num_labels
    assert selection.max_per_label == layout.max_per_label
    assert selection.batch == labels.batch and selection.index.shape == (labels.batch, selection.count)
    assert selection.index.dtype == selection.cu_latents.dtype == torch.int64
    assert selection.cu_latents.tolist() == sums
    for image, chosen in enumerate(latents):
        assert selection.index[image, : len(chosen)].tolist() == chosen
        assert selection.is_present[image].nonzero().flatten().tolist() == chosen
        of_rows = [next(label for label, end in enumerate(layout.cu_latents[1:]) if latent < end) for latent in chosen]
        padding = [layout.num_labels] * (selection.count - len(chosen))
        assert selection.labels(torch.device("cpu"))[image].tolist() == of_rows + padding
    if selection.index.numel():
        assert selection.index.min() >= 0 and selection.index.max() < max(layout.count, 1)


@any_map
def test_selection(labels):
    selection = LAYOUT.present_in(MAPS[labels])
    assert_selects(selection, LAYOUT, MAPS[labels])
    most = max(len(latents) for latents in selected_by_hand(LAYOUT, MAPS[labels])[0])
    assert selection.count == max(most, 1)
    assert torch.equal(selection.offsets(torch.device("cpu")), selection.cu_latents)


@given(st.data())
def test_selection_of_any_layout(data):
    num_labels = data.draw(st.integers(1, 6))
    layout = LatentLayout(tuple(data.draw(st.lists(st.integers(0, 4), min_size=num_labels, max_size=num_labels))))
    without = data.draw(st.sets(st.integers(-1, num_labels - 1), max_size=num_labels))
    height, width = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    labels = random_map(data.draw(st.integers(0, 3)), height, width, num_labels, without=sorted(without))
    assert_selects(layout.present_in(labels), layout, labels)


def test_values_out_of_range_select_nothing():
    labels = LabelMap(torch.tensor([[[-7, 1, 2**31 - 1, 5]]], dtype=torch.int32), 5)
    assert LAYOUT.present_in(labels).index.tolist() == [[3]]


def test_gather():
    labels = MAPS["different labels"]
    selection = LAYOUT.present_in(labels)
    latents, _ = selected_by_hand(LAYOUT, labels)
    own, shared = torch.randn(2, LAYOUT.count, 3, 4), torch.randn(LAYOUT.count, 3)
    assert selection.gather(own).shape == (2, selection.count, 3, 4)
    for image, chosen in enumerate(latents):
        assert torch.equal(selection.gather(own)[image, : len(chosen)], own[image, chosen])
        assert torch.equal(selection.gather(shared)[image, : len(chosen)], shared[chosen])
    assert selection.gather(torch.arange(LAYOUT.count)).tolist() == selection.index.tolist()
    one = LAYOUT.present_in(LabelMap(labels.labels[:1].clone(), 5))
    assert torch.equal(one.gather(own), own[:, latents[0]])
    rows = torch.randn(2, LAYOUT.count, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(selection.gather, [rows])
    assert torch.autograd.gradgradcheck(selection.gather, [rows])


@pytest.mark.parametrize("shape", [(), (10,), (2, 10, 3), (3, 11, 2), (1, 10)], ids=str)
def test_gather_of_other_shapes_is_refused(shape):
    selection = LAYOUT.present_in(MAPS["different labels"])
    with pytest.raises(ValueError, match=r"^rows: expected shape \(2, 11, \.\.\.\) or \(11, \.\.\.\), got \("):
        selection.gather(torch.zeros(shape))


def test_present_in_checks_its_argument():
    with pytest.raises(TypeError, match=r"^label_map: expected a LabelMap, got Tensor$"):
        LAYOUT.present_in(LABELS.labels)
    with pytest.raises(ValueError, match=r"^label_map: expected 5 labels like the layout, got 3$"):
        LAYOUT.present_in(random_map(1, 3, 4, 3))


def test_pytree_and_pickle():
    selection = LAYOUT.present_in(MAPS["different labels"])
    file = io.BytesIO()
    torch.save(selection, file)
    file.seek(0)
    for other in (
        pytree.tree_map(torch.clone, selection),
        pickle.loads(pickle.dumps(selection)),
        torch.load(file, weights_only=True),
    ):
        assert isinstance(other, LatentSelection) and other.layout == LAYOUT
        assert torch.equal(other.index, selection.index) and torch.equal(other.cu_latents, selection.cu_latents)


@pytest.mark.compiled
@any_map
def test_selection_in_a_graph_is_as_large_as_any_could_be(native, labels):
    """Nothing is read back: the rest of the rows is padding."""
    torch._dynamo.reset()

    def select(labels: LabelMap) -> tuple[LatentSelection, Tensor]:
        selection = LAYOUT.present_in(labels)
        return selection, selection.is_present

    selection, is_present = torch.compile(select, fullgraph=True, backend="aot_eager")(MAPS[labels])
    assert_selects(selection, LAYOUT, MAPS[labels])
    pixels = MAPS[labels].height * MAPS[labels].width
    assert selection.count == sum(sorted(LAYOUT.latents_per_label)[-pixels:])
    assert torch.equal(is_present, LAYOUT.present_in(MAPS[labels]).is_present)
    one_pixel = LabelMap(MAPS[labels].labels[:, :1, :1].clone(), 5)
    smaller, _ = torch.compile(select, fullgraph=True, backend="aot_eager")(one_pixel)
    assert smaller.count == LAYOUT.max_per_label
    torch._dynamo.reset()


def rows_of(problem: Problem) -> tuple[str, ...]:
    """The tensors that have a row for each latent."""
    return tuple(name for name, tensor in problem.tensors.items() if tensor.dim() > 2 and name != "x")


def solve_selected(problem: Problem, selection: LatentSelection, backend: str) -> dict[str, Tensor | None]:
    """Like ``solve``, with the rows gathered on the way: the gradients are those of the layout's rows."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}
    rows = {name: gathered(selection, inputs[name]) for name in rows_of(problem)}
    with sca_kernels.backend(backend):
        results = apply(problem.changed(layout=selection), {**inputs, **rows})
    flows = {}
    for name, gradient in problem.gradients.items():
        assert gradient is not None
        flows[name] = gradient if name in ("out", "mean", "second_moment") else gathered(selection, gradient, 0.0)
    found = torch.autograd.grad(list(results.values()), list(inputs.values()), [flows[name] for name in results])
    return {
        **{name: result.detach() for name, result in results.items()},
        **{f"grad_{name}": gradient for name, gradient in zip(inputs, found, strict=True)},
    }


def rows_in_use(selection: LatentSelection) -> Tensor:
    """(B, 1, m'): which rows are no padding."""
    return (torch.arange(selection.count) < selection.cu_latents[:, -1:]).unsqueeze(1)


def gathered(selection: LatentSelection, values: Tensor, padding: float | None = None) -> Tensor:
    """The selected rows of values for each image, head and latent, with some number in the place of the padding."""
    rows = selection.gather(values.transpose(1, 2)).transpose(1, 2)
    if padding is None:
        return rows
    return torch.where(rows_in_use(selection)[(..., *[None] * (rows.dim() - 3))], rows, padding)


def complete(operator: str, labels: LabelMap, dtype: torch.dtype = torch.float64, **arguments: Any) -> Problem:
    """Absent labels have no part in any result, so that a selection must give the same."""
    if operator == "semantic_pool":
        return pool_problem(labels, channels=5, dtype=dtype, empty="zero", **arguments)
    options = ("key_bias", "row_bias", "col_bias", "scale_bias", "empty_scale", "empty_shift")
    return away_from_kink(modulate_problem(labels, channels=5, dtype=dtype, options=options, **arguments))


@operator
@any_map
@either_backend
@pytest.mark.parametrize("memory", [torch.clone, channels_last])
def test_a_selection_equals_its_layout(native, operator, labels, backend, memory):
    """All results and gradients, those of the latents of absent labels included, which are zero."""
    problem = complete(operator, MAPS[labels])
    problem = problem.with_tensors(x=memory(problem.tensors["x"]))
    selection = LAYOUT.present_in(MAPS[labels])
    actual = solve_selected(problem, selection, backend)
    expected = expect(in_use_only(problem, selection))
    if operator == "semantic_pool":
        for name in POOL_RESULTS[:4]:
            expected[name] = gathered(selection, expected[name], -torch.inf if name == "lse" else 0.0)
    assert_close(actual, expected, TOLERANCE[torch.float64])


def in_use_only(problem: Problem, selection: LatentSelection) -> Problem:
    """No gradient flows into the results of latents that are not selected."""
    gradients = dict(problem.gradients)
    for name in POOL_RESULTS[:4]:
        if name in gradients:
            present = selection.is_present.unsqueeze(1)[(..., *[None] * (gradients[name].dim() - 3))]
            gradients[name] = torch.where(present, gradients[name], 0)
    return problem.changed(gradients=gradients)


@any_map
@either_backend
def test_the_uniform_rule_with_a_selection(native, labels, backend):
    """The mean of all rows, given as what takes the place of the sums, is what the layout's uniform rule gives."""
    problem = away_from_kink(modulate_problem(MAPS[labels], channels=5, dtype=torch.float64))
    selection = LAYOUT.present_in(MAPS[labels])
    expected = expect(problem)
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}
    rows = {name: gathered(selection, inputs[name]) for name in rows_of(problem)}
    means = {f"empty_{name}": inputs[name].mean(2).sum(1) for name in ("scale", "shift")}
    with sca_kernels.backend(backend):
        out = apply(problem.changed(layout=selection), {**inputs, **rows, **means})["out"]
    found = torch.autograd.grad(out, list(inputs.values()), problem.gradients["out"])
    actual: Values = {"out": out.detach(), **{f"grad_{name}": value for name, value in zip(inputs, found, strict=True)}}
    assert_close(actual, expected, TOLERANCE[torch.float64])


@operator
@pytest.mark.parametrize("labels", ["different labels", "one image has none", "none"])
@pytest.mark.parametrize("empty", ["uniform", "zero"])
def test_padding_is_like_latents_without_pixels(capability, operator, labels, empty):
    """Whatever its rows hold, and whatever flows into its results."""
    selection = LAYOUT.present_in(MAPS[labels])
    options = {} if operator == "semantic_pool" else {"options": ("key_bias", "row_bias", "empty_scale", "empty_shift")}
    problem = away_from_kink(
        BUILDERS[operator](MAPS[labels], selection, channels=5, dtype=torch.float64, empty=empty, **options)
    )
    actual = assert_matches_reference(problem)
    in_use = rows_in_use(selection).expand(2, 2, -1)
    assert not in_use.all()
    for name in rows_of(problem):
        assert not actual[f"grad_{name}"][~in_use].any(), name
    if operator == "semantic_pool":
        assert actual["lse"][~in_use].isneginf().all()
        expected = actual["mean"].unsqueeze(1).unsqueeze(1).expand_as(actual["pooled"])[~in_use]
        torch.testing.assert_close(actual["pooled"][~in_use], expected if empty == "uniform" else expected * 0)
    spoiled = problem
    for name in rows_of(problem):
        rows = problem.tensors[name].clone()
        rows[~in_use] = torch.nan
        spoiled = spoiled.with_tensors(**{name: rows})
    assert_same_bits(solve(spoiled, "cpu"), actual)


@operator
@either_backend
def test_a_selection_of_another_map(native, operator, backend):
    """Pixels of a label that it leaves out have no latents; latents of labels that are not there have no pixels."""
    selection = LAYOUT.present_in(MAPS["different labels"])
    problem = complete(operator, random_map(2, 3, 4, 5, seed=4))
    gradients = {
        name: gathered(selection, value) if value.dim() > 2 and name != "out" else value
        for name, value in problem.gradients.items()
    }
    rows = {name: gathered(selection, problem.tensors[name]) for name in rows_of(problem)}
    problem = problem.with_tensors(**rows).changed(layout=selection, gradients=gradients)
    actual = solve(problem, backend)
    for image, owned in enumerate(selection.cu_latents.diff().tolist()):
        rows = sum(owned)
        alone = problem.changed(
            layout=LatentLayout(tuple(owned)),
            labels=LabelMap(problem.labels.labels[image : image + 1].clone(), 5),
            tensors=of_image(problem.tensors, image, rows),
            gradients=of_image(gradients, image, rows),
        )
        expected = expect(alone)
        assert_close(of_image(actual, image, rows), expected, TOLERANCE[torch.float64])


def of_image(values: Any, image: int, rows: int) -> dict[str, Any]:
    """The part of an image, without padding."""
    parts = {name: value[image : image + 1] for name, value in values.items()}
    whole = ("x", "out", "mean", "second_moment", "scale_bias", "empty_scale", "empty_shift")
    return {name: part if name.removeprefix("grad_") in whole else part[:, :, :rows] for name, part in parts.items()}


@operator
def test_threads_and_repetition_change_no_bit(capability, use_threads, operator):
    labels = label_map(torch.stack((random_map(1, 28, 31, 3).labels[0], torch.full((28, 31), 2))), 3)
    selection = LatentLayout((5, 4, 9)).present_in(labels)
    options = {} if operator == "semantic_pool" else {"options": ("key_bias", "empty_scale", "empty_shift")}
    problem = BUILDERS[operator](labels, selection, channels=16, **options)
    results = []
    for threads in (1, 2, 3, 1):
        use_threads(threads)
        results.append(solve(problem, "cpu"))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@operator
@either_backend
def test_one_selection_for_all_images(native, operator, backend):
    """Of one map, for as many images as there are."""
    labels = MAPS["one map"]
    problem = complete(operator, labels, batch=3)
    actual = solve_selected(problem, LAYOUT.present_in(labels), backend)
    repeated = LabelMap(labels.labels.expand(3, -1, -1).contiguous(), 5)
    expected = solve_selected(problem.changed(labels=repeated), LAYOUT.present_in(repeated), backend)
    assert_same_bits(actual, expected)


@operator
@either_backend
@pytest.mark.parametrize("layout", [LatentLayout((0, 0, 0, 0, 0)), LatentLayout((2, 0, 0, 0, 0))], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_selections_of_little(native, operator, backend, layout, batch):
    """Of no latents, of latents of no present label, of no images."""
    labels = label_map(torch.full((batch, 3, 4), 3), 5)
    selection = layout.present_in(labels)
    options = {} if operator == "semantic_pool" else {"options": ("key_bias", "empty_scale", "empty_shift")}
    problem = BUILDERS[operator](labels, selection, batch=batch, channels=5, dtype=torch.float64, **options)
    problem = away_from_kink(problem)
    assert_close(solve(problem, backend), expect(problem), TOLERANCE[torch.float64])


@pytest.mark.compiled
@operator
def test_a_selection_made_in_a_graph(native, operator):
    """It has more rows, and gives the same."""
    torch._dynamo.reset()
    problem = complete(operator, MAPS["different labels"])
    names = tuple(problem.tensors)

    def program(labels: LabelMap, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(names, inputs, strict=True))
        selection = LAYOUT.present_in(labels)
        rows = {name: gathered(selection, tensors[name]) for name in rows_of(problem)}
        results = apply(problem.changed(labels=labels, layout=selection), {**tensors, **rows})
        latents = results.pop("pooled", None)
        if latents is None:
            return (results["out"],)
        latents = torch.where((selection.labels(latents.device) < 5)[:, None, :, None], latents, 0)
        return latents.sum(2), results["mean"], results["second_moment"]

    inputs = [tensor.requires_grad_() for tensor in problem.tensors.values()]
    results = []
    for function in (program, torch.compile(program, fullgraph=True, backend="aot_eager")):
        outputs = function(problem.labels, *inputs)
        gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs, allow_unused=True)
        results.append([*outputs, *(gradient for gradient in gradients if gradient is not None)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def pool_present(labels: LabelMap, x: Tensor, queries: Tensor) -> Tensor:
    selection = LAYOUT.present_in(labels)
    return semantic_pool(gathered(selection, queries), x, selection, labels, empty="zero").pooled.sum(2)


@pytest.mark.compiled
def test_a_selection_made_in_a_graph_for_any_size(native):
    torch._dynamo.reset()
    function = torch.compile(pool_present, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width, batch in ((6, 7, 2), (9, 5, 2), (40, 33, 3), (1, 2, 2)):
        labels = random_map(batch, height, width, 5)
        tensors = pool_problem(labels, batch=batch, channels=4).tensors
        arguments = (labels, tensors["x"], tensors["queries"])
        torch.testing.assert_close(function(*arguments), pool_present(*arguments))
    torch._dynamo.reset()


class Pool(torch.nn.Module):
    def forward(self, selection: LatentSelection, labels: LabelMap, x: Tensor, queries: Tensor) -> Tensor:
        return semantic_pool(queries, x, selection, labels).pooled


@pytest.mark.compiled
def test_export_with_a_selection_is_saved_and_loaded(native):
    labels = MAPS["different labels"]
    selection = LAYOUT.present_in(labels)
    tensors = pool_problem(labels, selection, channels=4).tensors
    arguments = (selection, labels, tensors["x"], tensors["queries"])
    file = io.BytesIO()
    torch.export.save(torch.export.export(Pool(), arguments), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(*arguments), Pool()(*arguments))
