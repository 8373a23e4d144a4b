"""Semantic cross-attention with selections of latents as tokens, and with a given value for queries without keys."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from folded import LAYOUT, MAPS, Values, assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from tokens import COMBINATIONS, TOLERANCE, Problem, Tokens, error_ratio, label_map, make_problem, random_map
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, LatentSelection, semantic_cross_attention

# What attends to what; "present" is a selection of those "all" latents whose labels are there.
KINDS = {
    "pixel-present": ("pixels", "present"),
    "present-pixel": ("present", "pixels"),
    "present-present": ("present", "present"),
    "present-all": ("present", "all"),
    "all-present": ("all", "present"),
}
OPERATORS = [torch.ops.sca.semantic_cross_attention.default, torch.ops.sca.semantic_cross_attention_backward.default]

kinds = pytest.mark.parametrize("kinds", KINDS)
any_map = pytest.mark.parametrize("labels", MAPS)
combination = pytest.mark.parametrize("combination", COMBINATIONS)
either_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def tokens_of(kinds: str, labels: LabelMap, layout: LatentLayout = LAYOUT) -> list[Tokens]:
    tokens: dict[str, Tokens] = {"pixels": labels, "present": layout.present_in(labels), "all": layout}
    return [tokens[kind] for kind in KINDS[kinds]]


def random_problem(kinds: str, labels: LabelMap, layout: LatentLayout = LAYOUT, **arguments: Any) -> Problem:
    return make_problem(*tokens_of(kinds, labels, layout), **{"dtype": torch.float64, **arguments})


def random_value(problem: Problem) -> Tensor:
    """What queries without keys may get, (B, H, Dv)."""
    batch, heads, _, width = problem.value.shape
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, heads, width, generator=generator, dtype=torch.float64).to(problem.value.dtype)


def solve(
    problem: Problem, backend: str, empty_value: Tensor | None = None, empty: str = "zero", **settings: Any
) -> dict[str, Tensor | None]:
    """Results and gradients by name; those through ``empty_value`` to the tensor that is given, whatever its shape."""
    tensors = {"query": problem.query, "key": problem.key, "value": problem.value}
    if empty_value is not None:
        tensors["empty_value"] = empty_value
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    arguments = {**inputs, "query_tokens": problem.query_tokens, "key_tokens": problem.key_tokens, **settings}
    with sca_kernels.backend(backend):
        out, lse = semantic_cross_attention(**arguments, empty=empty, return_lse=True)
    found = torch.autograd.grad([out, lse], list(inputs.values()), [problem.grad_out, problem.grad_lse])
    gradients = {f"grad_{name}": gradient for name, gradient in zip(inputs, found, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def rules(problem: Problem) -> list[tuple[str, Tensor | None]]:
    """All that a query without keys may get: ``empty`` and ``empty_value``."""
    possible: list[tuple[str, Tensor | None]] = [("zero", None), ("uniform", random_value(problem))]
    if not isinstance(problem.key_tokens, LatentSelection):
        possible.append(("uniform", None))
    return possible


def is_padding(tokens: Tokens) -> Tensor:
    """(B or 1, N): which tokens are what is left over of a selection."""
    if isinstance(tokens, LatentSelection):
        return torch.arange(tokens.count) >= tokens.cu_latents[:, -1:]
    rows = tokens.count if isinstance(tokens, LatentLayout) else tokens.height * tokens.width
    return torch.zeros(1, rows, dtype=torch.bool)


def masked(rows: Tensor, tokens: Tokens, number: float) -> Tensor:
    """Rows (B, H, N, ...) with a number in the place of padding."""
    left_over = is_padding(tokens).unsqueeze(1)
    return torch.where(left_over[(..., *[None] * (rows.dim() - 3))], number, rows)


def without_gradients_of_padding(problem: Problem) -> Problem:
    assert problem.grad_out is not None and problem.grad_lse is not None
    tokens = problem.query_tokens
    return problem.changed(
        grad_out=masked(problem.grad_out, tokens, 0.0), grad_lse=masked(problem.grad_lse, tokens, 0.0)
    )


QUERIES = ("query", "grad_out", "grad_lse", "out", "lse", "grad_query")
KEYS = ("key", "value", "grad_key", "grad_value")


def of_image(values: Values, problem: Problem, image: int) -> dict[str, Any]:
    """The part of tensors by name that belongs to an image, without padding."""
    parts: dict[str, Any] = {}
    for name, tensor in values.items():
        assert tensor is not None
        part = tensor[image : image + 1]
        if name in QUERIES or name in KEYS:
            left_over = is_padding(problem.query_tokens if name in QUERIES else problem.key_tokens)
            part = part[:, :, ~left_over[min(image, len(left_over) - 1)]]
        parts[name] = part
    return parts


def tokens_of_image(tokens: Tokens, image: int) -> Tokens:
    """As a map or a layout."""
    if isinstance(tokens, LabelMap):
        return LabelMap(tokens.labels[min(image, tokens.batch - 1)].unsqueeze(0).clone(), tokens.num_labels)
    if isinstance(tokens, LatentSelection):
        return LatentLayout(tuple(tokens.cu_latents.diff()[min(image, tokens.batch - 1)].tolist()))
    return tokens


def assert_equals_layouts(problem: Problem, backend: str) -> None:
    """In each image a selection is the layout in which absent labels own nothing, and its padding is not there."""
    problem = without_gradients_of_padding(problem)
    tensors = {name: getattr(problem, name) for name in ("query", "key", "value", "grad_out", "grad_lse")}
    for empty, empty_value in rules(problem):
        actual = solve(problem, backend, empty_value, empty)
        for image in range(problem.query.shape[0]):
            alone = Problem(
                **of_image(tensors, problem, image),
                query_tokens=tokens_of_image(problem.query_tokens, image),
                key_tokens=tokens_of_image(problem.key_tokens, image),
            )
            value = None if empty_value is None else empty_value[image : image + 1]
            expected = solve(alone, "reference", value, empty)
            assert_close(of_image(actual, problem, image), expected, TOLERANCE[torch.float64])


@kinds
@any_map
def test_a_selection_is_a_layout_in_each_image(capability, kinds, labels):
    assert_equals_layouts(random_problem(kinds, MAPS[labels]), "cpu")


@kinds
@any_map
def test_a_selection_is_a_layout_in_each_image_for_the_reference(kinds, labels):
    assert_equals_layouts(random_problem(kinds, MAPS[labels]), "reference")


@kinds
@either_backend
def test_a_selection_of_another_map(native, kinds, backend):
    """Pixels of a label that it leaves out have no latents; latents of labels that are not there have no pixels."""
    others = MAPS["different labels"], random_map(2, 3, 4, 5, seed=4)
    tokens = [
        first if isinstance(first, LatentSelection) else second
        for first, second in zip(*(tokens_of(kinds, labels) for labels in others), strict=True)
    ]
    assert_equals_layouts(make_problem(*tokens, dtype=torch.float64), backend)


@kinds
@any_map
def test_padding_is_like_latents_without_partners(capability, kinds, labels):
    """Whatever its rows hold, and whatever flows into its results."""
    problem = random_problem(kinds, MAPS[labels], key_width=16, value_width=8)
    query_tokens, key_tokens = problem.query_tokens, problem.key_tokens
    for empty, empty_value in rules(problem):
        actual = solve(problem, "cpu", empty_value, empty)
        assert_close(actual, solve(problem, "reference", empty_value, empty), TOLERANCE[torch.float64])
        instead = problem.value.mean(2) if empty == "uniform" else torch.zeros_like(problem.value[:, :, 0])
        instead = instead if empty_value is None else empty_value
        left_over = is_padding(query_tokens).unsqueeze(1).expand(2, 2, -1)
        assert actual["lse"][left_over].isneginf().all()
        torch.testing.assert_close(actual["out"][left_over], instead.unsqueeze(2).expand_as(actual["out"])[left_over])
        assert not actual["grad_query"][left_over].any()
        left_over = is_padding(key_tokens).unsqueeze(1).expand(2, 2, -1)
        assert not actual["grad_key"][left_over].any() and not actual["grad_value"][left_over].any()
        spoiled = problem.changed(
            query=masked(problem.query, query_tokens, torch.nan),
            key=masked(problem.key, key_tokens, torch.nan),
            value=masked(problem.value, key_tokens, torch.nan),
        )
        assert_same_bits(solve(spoiled, "cpu", empty_value, empty), actual)


def test_there_is_padding_to_test():
    assert is_padding(LAYOUT.present_in(MAPS["different labels"])).any()
    assert is_padding(LAYOUT.present_in(MAPS["none"])).all()


@any_map
@either_backend
def test_the_uniform_rule_with_a_selection(native, labels, backend):
    """The mean of all values, given to queries without keys, is what the layout's uniform rule gives."""
    selection = LAYOUT.present_in(MAPS[labels])
    problem = make_problem(MAPS[labels], LAYOUT, dtype=torch.float64)
    expected = solve(problem, "reference", empty="uniform")
    inputs = [tensor.detach().requires_grad_() for tensor in problem.inputs]
    query, *rows = inputs
    key, value = (selection.gather(tensor.transpose(1, 2)).transpose(1, 2) for tensor in rows)
    with sca_kernels.backend(backend):
        out, lse = semantic_cross_attention(
            query, key, value, MAPS[labels], selection, empty_value=rows[1].mean(2), return_lse=True
        )
    found = torch.autograd.grad([out, lse], inputs, [problem.grad_out, problem.grad_lse])
    names = ("grad_query", "grad_key", "grad_value")
    actual = {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))}
    assert_close(actual, expected, TOLERANCE[torch.float64])


@st.composite
def selected_problems(draw: st.DrawFn) -> Problem:
    """Of a map that need not be that of the pixels, up to two of the kernels' chunks."""
    num_labels = draw(st.integers(1, 6))
    layout = LatentLayout(tuple(draw(st.lists(st.integers(0, 9), min_size=num_labels, max_size=num_labels))))
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    maps = [
        random_map(
            2, height, width, num_labels, without=sorted(draw(st.sets(st.integers(-1, num_labels - 2)))), seed=seed
        )
        for seed in (draw(st.integers(0, 99)), draw(st.integers(0, 99)))
    ]
    kinds = draw(st.sampled_from(sorted(KINDS)))
    tokens = [tokens_of(kinds, labels, layout)[side] for side, labels in enumerate(maps)]
    return make_problem(*tokens, key_width=draw(st.integers(1, 20)), value_width=draw(st.integers(1, 20)))


@given(selected_problems(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_native_equals_reference(native, problem, is_given, dtype):
    problem = problem.to(dtype)
    empty_value = random_value(problem) if is_given else None
    exact = None if empty_value is None else empty_value.double()
    expected = solve(problem.to(torch.float64), "reference", exact)
    assert_close(solve(problem, "cpu", empty_value), expected, TOLERANCE[dtype])


@kinds
@either_backend
def test_one_selection_for_all_images(native, kinds, backend):
    labels = MAPS["one map"]
    repeated = LabelMap(labels.labels.expand(3, -1, -1).contiguous(), 5)
    for empty, empty_value in rules(random_problem(kinds, labels, batch=3)):
        one, three = (
            solve(random_problem(kinds, these, batch=3), backend, empty_value, empty) for these in (labels, repeated)
        )
        assert_same_bits(one, three)


@kinds
@pytest.mark.parametrize("layout", [LatentLayout((0, 0, 0, 0, 0)), LatentLayout((2, 0, 0, 0, 0))], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_selections_of_little(native, kinds, layout, batch):
    """Of no latents, of latents of no present label, of no images."""
    problem = random_problem(kinds, label_map(torch.full((batch, 3, 4), 3), 5), layout, batch=batch)
    for empty, empty_value in rules(problem):
        expected = solve(problem, "reference", empty_value, empty)
        assert_close(solve(problem, "cpu", empty_value, empty), expected, TOLERANCE[torch.float64])


@kinds
def test_threads_and_repetition_change_no_bit(capability, use_threads, kinds):
    labels = label_map(torch.stack((random_map(1, 28, 31, 3).labels[0], torch.full((28, 31), 2))), 3)
    problem = random_problem(kinds, labels, LatentLayout((5, 4, 9)), dtype=torch.float32, value_width=8)
    results = []
    for threads in (1, 2, 3, 1):
        use_threads(threads)
        results.append(solve(problem, "cpu", random_value(problem)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@combination
@pytest.mark.parametrize("empty", ["uniform", "zero"])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_a_given_value(capability, combination, empty, width):
    """It comes in place of the mean or of zero, which then nothing depends on."""
    for dtype in (torch.float32, torch.float64):
        problem = make_problem(*COMBINATIONS[combination], value_width=width, dtype=dtype)
        value = random_value(problem)
        expected = solve(problem.to(torch.float64), "reference", value.double(), "zero")
        assert_close(solve(problem, "cpu", value, empty), expected, TOLERANCE[dtype])
        without = expected["lse"].isneginf()
        assert without.any()
        of_without = value.double().unsqueeze(2).expand_as(expected["out"])[without]
        assert torch.equal(expected["out"][without], of_without)


@combination
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_given_value_of_16_bits(native, combination, dtype):
    """Errors are no larger than those of the reference in that type."""
    problem = make_problem(*COMBINATIONS[combination], key_width=16, value_width=16, dtype=dtype)
    value = random_value(problem)
    expected = solve(problem.to(torch.float64), "reference", value.double())
    actual, rounded = solve(problem, "cpu", value), solve(problem, "reference", value)
    for name, wanted in expected.items():
        got, also = actual[name], rounded[name]
        assert got.dtype == also.dtype == (torch.float32 if name == "lse" else dtype)
        assert error_ratio(got, wanted) <= 1.5 * error_ratio(also, wanted) + 1e-6, name


@combination
def test_the_mean_as_a_given_value(native, combination):
    """It is the uniform rule, and its gradient is what that rule spreads over the values."""
    problem = make_problem(*COMBINATIONS[combination], dtype=torch.float64)
    spread, zero = (solve(problem, "cpu", empty=empty) for empty in ("uniform", "zero"))
    actual = solve(problem, "cpu", problem.value.mean(2))
    shared = actual.pop("grad_empty_value").unsqueeze(2) / problem.value.shape[2]
    torch.testing.assert_close(spread["grad_value"] - zero["grad_value"], shared.expand_as(problem.value))
    assert_close(actual, {**zero, "out": spread["out"]}, TOLERANCE[torch.float64])


@either_backend
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1), (2, 1, 7), (2, 2, 1)], ids=str)
def test_a_given_value_is_broadcast(native, shape, backend):
    problem = make_problem(*COMBINATIONS["pixel-latent"], dtype=torch.float64)
    value = torch.randn(shape, dtype=torch.float64)
    actual = solve(problem, backend, value)
    expected = solve(problem, backend, value.expand(2, 2, 7).contiguous())
    whole = expected.pop("grad_empty_value")
    torch.testing.assert_close(actual.pop("grad_empty_value"), whole.sum_to_size(shape))
    assert_same_bits(actual, expected)


@combination
def test_every_set_of_gradients(native, combination):
    """Which are asked for changes none of them."""
    problem = make_problem(*COMBINATIONS[combination], dtype=torch.float64)
    tensors = (*problem.inputs, random_value(problem))
    expected = list(solve(problem, "cpu", tensors[3]).values())[2:]
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        inputs = [tensor.detach().requires_grad_(asked) for tensor, asked in zip(tensors, wanted, strict=True)]
        with sca_kernels.backend("cpu"):
            results = semantic_cross_attention(
                *inputs[:3], problem.query_tokens, problem.key_tokens, empty_value=inputs[3], return_lse=True
            )
        asked_for = [tensor for tensor in inputs if tensor.requires_grad]
        found = torch.autograd.grad(results, asked_for, [problem.grad_out, problem.grad_lse])
        for got, whole in zip(found, itertools.compress(expected, wanted), strict=True):
            torch.testing.assert_close(got, whole)


def test_a_given_value_that_no_query_takes(native):
    problem = make_problem(random_map(2, 3, 5, 3, without=[-1]), LatentLayout((2, 1, 3)))
    expected = solve(problem, "cpu")
    actual = solve(problem, "cpu", random_value(problem))
    assert not actual.pop("grad_empty_value").any()
    assert_same_bits(actual, expected)


@kinds
def test_gradcheck(capability, kinds):
    """The gradients against differences of the outputs of the same kernels."""
    labels, layout = label_map([[[0, 0, 1], [2, -1, 0]], [[3, 3, 2], [2, 3, -1]]], 4), LatentLayout((2, 0, 1, 1))
    problem = random_problem(kinds, labels, layout, heads=1, key_width=2, value_width=3)

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *tensors, value = inputs
        with sca_kernels.backend("cpu"):
            out, lse = semantic_cross_attention(
                *tensors, problem.query_tokens, problem.key_tokens, empty_value=value, return_lse=True
            )
        return out, lse.masked_fill(lse == -torch.inf, 0)  # differences of infinities are not numbers

    inputs = [tensor.requires_grad_() for tensor in (*problem.inputs, random_value(problem))]
    assert torch.autograd.gradcheck(attend, inputs)
    with sca_kernels.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *inputs: attend_by_default(problem, *inputs), inputs)


def attend_by_default(problem: Problem, query: Tensor, key: Tensor, value: Tensor, empty_value: Tensor) -> Tensor:
    tokens = problem.query_tokens, problem.key_tokens
    return semantic_cross_attention(query, key, value, *tokens, empty_value=empty_value)


class Recorder(TorchDispatchMode):
    """What the operators of this library are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.calls[operator] = pytree.tree_map_only(Tensor, Tensor.detach, arguments)
        return operator(*arguments, **(options or {}))


@pytest.mark.compiled
@kinds
def test_opcheck(native, kinds):
    problem = random_problem(kinds, MAPS["different labels"], dtype=torch.float32)
    with Recorder() as recorder:
        solve(problem, "cpu", random_value(problem))
    for operator in OPERATORS:
        torch.library.opcheck(operator, recorder.calls[operator])
    *inputs, empty_value = recorder.calls[OPERATORS[0]][:4]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, empty_value)]
    torch.library.opcheck(OPERATORS[0], (*leaves, *recorder.calls[OPERATORS[0]][4:]))
    *arguments, mask = recorder.calls[OPERATORS[1]]
    assert mask == [True] * 4
    for mask in ([True, True, True, False], [False, False, False, True]):
        torch.library.opcheck(OPERATORS[1], (*arguments, mask))


def attend_to_present(labels: LabelMap, *inputs: Tensor) -> Tensor:
    """Latents look at pixels, then pixels at those latents; with the rows of all latents on the way in and out."""
    x, queries, values = inputs
    selection = LAYOUT.present_in(labels)
    latents = semantic_cross_attention(selected(selection, queries), x, x, selection, labels)
    given = values.mean(2)
    return semantic_cross_attention(x, latents, selected(selection, values), labels, selection, empty_value=given)


def selected(selection: LatentSelection, rows: Tensor) -> Tensor:
    return selection.gather(rows.transpose(1, 2)).transpose(1, 2)


@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(native, dynamic):
    """Where the selection is made in the graph, with more padding."""
    torch._dynamo.reset()
    function = torch.compile(attend_to_present, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height, width in ((3, 4), (6, 7), (1, 2)):
        labels = random_map(2, height, width, 5, without=[1])
        generator = torch.Generator().manual_seed(height)
        inputs = [
            torch.randn(2, 2, count, 6, generator=generator, dtype=torch.float64, requires_grad=True)
            for count in (height * width, LAYOUT.count, LAYOUT.count)
        ]
        results = []
        for program in (attend_to_present, function):
            out = program(labels, *inputs)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


class Attend(torch.nn.Module):
    def forward(self, labels: LabelMap, selection: LatentSelection, x: Tensor, rows: Tensor, given: Tensor) -> Tensor:
        return semantic_cross_attention(x, rows, rows, labels, selection, empty_value=given)


@pytest.mark.compiled
def test_export(native):
    labels = MAPS["different labels"]
    selection = LAYOUT.present_in(labels)
    arguments = (labels, selection, torch.randn(2, 1, 12, 4), torch.randn(2, 1, selection.count, 4), torch.randn(4))
    program = torch.export.export(Attend(), arguments).module()
    assert torch.equal(program(*arguments), Attend()(*arguments))


def test_autocast(native):
    problem = make_problem(*COMBINATIONS["pixel-latent"])
    value = random_value(problem).double()
    inputs = [tensor.requires_grad_() for tensor in (*problem.inputs, value.float())]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_by_default(problem, *inputs)
        double = attend_by_default(problem, *(tensor.double() for tensor in inputs))
    by_hand = attend_by_default(problem, *(tensor.bfloat16() for tensor in inputs))
    assert out.dtype == torch.bfloat16 and torch.equal(out, by_hand) and double.dtype == torch.float64
    for got, wanted in zip(*(torch.autograd.grad(result.sum(), inputs) for result in (out, by_hand)), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)
