"""Semantic cross-attention inside PyTorch: compilation, export, autocast, checkpoints, other threads and processes."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokens import COMBINATIONS, Tokens, combine, label_map, make_problem, random_map, solve
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, backends, semantic_cross_attention
from sca_kernels.labels import tile_size

pytestmark = pytest.mark.usefixtures("native")

combination = pytest.mark.parametrize("combination", COMBINATIONS)

LAYOUT = LatentLayout((3, 1, 0, 2))
OPERATOR = torch.ops.sca.semantic_cross_attention.default
BACKWARD_OPERATOR = torch.ops.sca.semantic_cross_attention_backward.default


def make_inputs(height: int = 6, width: int = 7, *, batch: int = 2, seed: int = 0) -> tuple[LabelMap, list[Tensor]]:
    """Pixels as queries and latents as keys, with inputs that take gradients."""
    pixels = random_map(batch, height, width, 4, seed=seed)
    problem = make_problem(pixels, LAYOUT, batch=batch, key_width=8, value_width=8, seed=seed)
    return pixels, [tensor.requires_grad_() for tensor in problem.inputs]


def gradients(function: Callable[..., Tensor], *arguments: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The result of a function and the gradients of a number that depends on all of it."""
    out = function(*arguments)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def operator_arguments(combination: str, empty: str = "uniform") -> list[Any]:
    """What the public function passes to the operator."""
    problem = make_problem(*COMBINATIONS[combination])
    groupings: list[Any] = []
    most = []
    for tokens in (problem.query_tokens, problem.key_tokens):
        if isinstance(tokens, LabelMap):
            plan = tokens.at(tokens.height, tokens.width).plan
            assert plan is not None
            groupings += [plan.offsets, plan.order]
            most.append(0)
        else:
            groupings += [tokens.offsets(torch.device("cpu")), None]
            most.append(tokens.max_per_label)
    return [*problem.inputs, None, *groupings, *most, 0.5, empty, "cpu"]


@pytest.mark.compiled
@combination
def test_opcheck(combination):
    query, key, value, *rest = operator_arguments(combination)
    torch.library.opcheck(OPERATOR, (query, key, value, *rest))
    for order in ((2, 3), (1, 2)):  # strides of the result follow those of the query
        rearranged = query.transpose(*order).contiguous().transpose(*order)
        torch.library.opcheck(OPERATOR, (rearranged, key, value, *rest), test_utils=("test_schema", "test_faketensor"))
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(OPERATOR, (*leaves, *rest))


@pytest.mark.compiled
@combination
@pytest.mark.parametrize("mask", [(True, True, True, False), (True, False, False, False), (False, True, True, False)])
def test_opcheck_of_backward(combination, mask):
    arguments = operator_arguments(combination)
    inputs, rest = arguments[:4], arguments[4:]
    out, lse = OPERATOR(*inputs, *rest)
    saved_out = None if combination.endswith("latent") else out
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), grad_lse, *inputs, saved_out, lse, *rest, mask)
        torch.library.opcheck(BACKWARD_OPERATOR, arguments)


@pytest.mark.compiled
def test_opcheck_of_label_plan():
    for height, width in ((5, 7), (40, 9), (64, 65)):
        labels = random_map(2, height, width, 3).labels
        torch.library.opcheck(torch.ops.sca.label_plan.default, (labels, 3, *tile_size(height, width)))


@pytest.fixture
def graphs() -> Iterator[list[set[Any]]]:
    """The operators of each graph that :func:`compiled` has compiled in this test."""
    torch._dynamo.reset()
    yield _graphs
    _graphs.clear()
    torch._dynamo.reset()


_graphs: list[set[Any]] = []


def record_and_compile(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    _graphs.append({node.target for node in module.graph.nodes if node.op == "call_function"})
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Traced, differentiated and functionalised as ever, but run operator by operator: the kernels are the same."""
    return torch.compile(function, fullgraph=True, backend=record_and_compile, **options)


CLOSED_OVER = random_map(2, 6, 7, 4)


def with_argument(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    return semantic_cross_attention(*inputs, pixels, LAYOUT)


def with_planned_argument(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    return semantic_cross_attention(*inputs, pixels.at(6, 7), LAYOUT)


def with_map_closed_over(_: LabelMap, *inputs: Tensor) -> Tensor:
    return semantic_cross_attention(*inputs, CLOSED_OVER, LAYOUT)


def with_map_of_labels(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    labels = torch.where(pixels.labels < 0, 255, pixels.labels)
    inside = LabelMap.from_labels(labels, 4, ignore_index=255)
    return semantic_cross_attention(*inputs, inside, LAYOUT)


def with_map_of_mask(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    mask = pixels.labels.unsqueeze(1) == torch.arange(4).view(4, 1, 1)
    return semantic_cross_attention(*inputs, LabelMap.from_mask(mask), LAYOUT)


def with_resized_map(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    return semantic_cross_attention(*inputs, pixels.at(3, 5).at(6, 7), LAYOUT)


def with_layout_made_inside(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    return semantic_cross_attention(*inputs, pixels, LatentLayout((3, 1, 0, 2)))


def with_lse(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    out, lse = semantic_cross_attention(*inputs, pixels, LAYOUT, empty="zero", return_lse=True)
    return out * lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)


def with_work_around_it(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    out = with_argument(pixels, *(tensor.tanh() for tensor in inputs))
    return out.transpose(1, 2).flatten(2).relu() * 2


def with_two_calls(pixels: LabelMap, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Latents look at pixels, then pixels at those latents."""
    latents = semantic_cross_attention(key, query, query, LAYOUT, pixels)
    return semantic_cross_attention(query, latents, value, pixels, LAYOUT)


PROGRAMS = [
    with_argument, with_planned_argument, with_map_closed_over, with_map_of_labels, with_map_of_mask, with_resized_map,
    with_layout_made_inside, with_lse, with_work_around_it, with_two_calls,
]  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize("program", PROGRAMS)
def test_compiled_equals_eager(graphs, program):
    """In both orders, since what is remembered about a label map must not come from a trace."""
    pixels, inputs = make_inputs()
    traced_first = gradients(compiled(program), pixels, *inputs, inputs=inputs)
    expected = gradients(program, pixels, *inputs, inputs=inputs)
    assert_equal(traced_first, expected)
    assert_equal(gradients(compiled(program), pixels, *inputs, inputs=inputs), expected)
    fresh = LabelMap(pixels.labels.clone(), pixels.num_labels)
    function = compiled(program)
    for _ in range(2):
        assert_equal(gradients(function, fresh, *inputs, inputs=inputs), expected)
    assert_equal(gradients(program, fresh, *inputs, inputs=inputs), expected)
    assert graphs and all(OPERATOR in graph for graph in graphs)


@pytest.mark.compiled
@combination
def test_compiled_combinations_equal_eager(graphs, combination):
    problem = make_problem(*COMBINATIONS[combination])
    inputs = [tensor.requires_grad_() for tensor in problem.inputs]

    def program(query_tokens: Tokens, key_tokens: Tokens, *inputs: Tensor) -> Tensor:
        return semantic_cross_attention(*inputs, query_tokens, key_tokens)

    tokens = (problem.query_tokens, problem.key_tokens)
    expected = gradients(program, *tokens, *inputs, inputs=inputs)
    assert_equal(gradients(compiled(program), *tokens, *inputs, inputs=inputs), expected)
    with torch.no_grad():
        assert torch.equal(compiled(program)(*tokens, *inputs), expected[0])


@pytest.mark.compiled
def test_compiled_by_inductor_equals_eager(graphs):
    """Once through the default compiler, code generation included."""
    pixels, inputs = make_inputs()
    expected = gradients(with_work_around_it, pixels, *inputs, inputs=inputs)
    function = torch.compile(with_work_around_it, fullgraph=True)
    for got, wanted in zip(gradients(function, pixels, *inputs, inputs=inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.compiled
def test_compiled_for_any_size(graphs):
    """Other heights, widths and batches give the right results, and no error."""
    function = compiled(with_argument, dynamic=True)
    for height, width, batch in ((6, 7, 2), (9, 5, 2), (40, 33, 3), (6, 7, 2), (70, 65, 2)):
        pixels, inputs = make_inputs(height, width, batch=batch)
        expected = gradients(with_argument, pixels, *inputs, inputs=inputs)
        assert_equal(gradients(function, pixels, *inputs, inputs=inputs), expected)


@pytest.mark.compiled
def test_compiled_for_any_width(graphs):
    """A symbolic number of channels is part of the scale."""

    def program(*inputs: Tensor) -> Tensor:
        return semantic_cross_attention(*inputs, CLOSED_OVER, LAYOUT)

    function = compiled(program, dynamic=True)
    for key_width, value_width in ((8, 6), (5, 12), (16, 16)):
        problem = make_problem(CLOSED_OVER, LAYOUT, key_width=key_width, value_width=value_width)
        inputs = [tensor.requires_grad_() for tensor in problem.inputs]
        assert_equal(gradients(function, *inputs, inputs=inputs), gradients(program, *inputs, inputs=inputs))


def with_reference_inside(pixels: LabelMap, *inputs: Tensor) -> Tensor:
    with sca_kernels.backend("reference"):
        return semantic_cross_attention(*inputs, pixels, LAYOUT)


@pytest.mark.compiled
def test_backend_forced_inside_a_compiled_function(graphs):
    pixels, inputs = make_inputs()
    expected = gradients(with_reference_inside, pixels, *inputs, inputs=inputs)
    for got, wanted in zip(
        gradients(compiled(with_reference_inside), pixels, *inputs, inputs=inputs), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted)
    (graph,) = graphs
    assert OPERATOR not in graph


@pytest.mark.compiled
@pytest.mark.parametrize("order", [("cpu", "reference", "cpu"), ("reference", "cpu", "reference")])
def test_backend_forced_around_a_compiled_function(graphs, order):
    """The choice is that of the call, not that of the first call."""
    pixels, inputs = make_inputs()
    function = compiled(with_argument)
    for name in order:
        with sca_kernels.backend(name):
            function(pixels, *inputs)
    assert [OPERATOR in graph for graph in graphs] == [name == "cpu" for name in order[:2]]


class Attention(nn.Module):
    def __init__(self, pixels: LabelMap | None = None) -> None:
        super().__init__()
        self.pixels = pixels
        self.key = nn.Parameter(torch.randn(1, 2, LAYOUT.count, 8))
        self.value = nn.Parameter(torch.randn(1, 2, LAYOUT.count, 8))

    def forward(self, query: Tensor, pixels: LabelMap | None = None) -> Tensor:
        chosen = self.pixels if pixels is None else pixels
        batch = query.shape[0]
        latents = (tensor.expand(batch, -1, -1, -1) for tensor in (self.key, self.value))
        return semantic_cross_attention(query, *latents, chosen, LAYOUT)


@pytest.mark.compiled
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("held", ["argument", "attribute"])
def test_export(strict, held):
    """The exported program equals the module, and the module with the same label map still works eagerly."""
    pixels, (query, *_) = make_inputs()
    query = query.detach()
    module = Attention(pixels if held == "attribute" else None)
    arguments = (query,) if held == "attribute" else (query, pixels)
    program = torch.export.export(module, arguments, strict=strict)
    expected = module(*arguments)
    assert torch.equal(program.module()(*arguments), expected)
    assert any(node.target is OPERATOR for node in program.graph.nodes)
    assert torch.equal(module(*arguments), expected)
    with sca_kernels.backend("reference"):
        torch.testing.assert_close(module(*arguments), expected)


@pytest.mark.compiled
def test_export_is_saved_and_loaded():
    pixels, (query, *_) = make_inputs()
    module = Attention()
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (query.detach(), pixels)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(query.detach(), pixels), module(query.detach(), pixels))


@pytest.mark.compiled
def test_export_for_any_batch():
    pixels, (query, *_) = make_inputs()
    module = Attention()
    batch = torch.export.Dim("batch", min=2)
    dynamic = {"query": {0: batch}, "pixels": [{0: batch}, None]}
    program = torch.export.export(module, (query.detach(), pixels), dynamic_shapes=dynamic).module()
    for size in (2, 3):
        pixels, (query, *_) = make_inputs(batch=size)
        assert torch.equal(program(query.detach(), pixels), module(query.detach(), pixels))


@combination
def test_sizes_under_fake_tensors(combination):
    """Results of tensors that have sizes only, too large for any memory."""
    from torch._subclasses import FakeTensorMode

    query_tokens, key_tokens = COMBINATIONS[combination]
    heads, width = 2**16, 2**12
    with FakeTensorMode() as mode:
        query_tokens, key_tokens = (
            tokens if isinstance(tokens, LatentLayout) else LabelMap(mode.from_tensor(tokens.labels), tokens.num_labels)
            for tokens in (query_tokens, key_tokens)
        )
        queries, keys = (
            tokens.count if isinstance(tokens, LatentLayout) else tokens.height * tokens.width
            for tokens in (query_tokens, key_tokens)
        )
        inputs = [torch.empty(2, heads, count, width, requires_grad=True) for count in (queries, keys, keys)]
        out, lse = semantic_cross_attention(*inputs, query_tokens, key_tokens, return_lse=True)
        assert out.numel() > 2**31 and out.shape == inputs[0].shape and lse.shape == (2, heads, queries)
        found = torch.autograd.grad((out.sum() + lse.sum()), inputs)
        assert [gradient.shape for gradient in found] == [tensor.shape for tensor in inputs]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_a_cast(backend, dtype):
    pixels, inputs = make_inputs()
    with sca_kernels.backend(backend):
        with torch.autocast("cpu", dtype=dtype):
            out, lse = semantic_cross_attention(*inputs, pixels, LAYOUT, return_lse=True)
        by_hand, lse_by_hand = semantic_cross_attention(
            *(tensor.to(dtype) for tensor in inputs), pixels, LAYOUT, return_lse=True
        )
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, by_hand) and torch.equal(lse, lse_by_hand)
    sides = zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(by_hand.sum(), inputs), strict=True)
    for gradient, gradient_by_hand in sides:
        assert gradient.dtype == torch.float32 and torch.equal(gradient, gradient_by_hand)


def test_autocast_unites_types_and_spares_float64():
    pixels, (query, key, value) = make_inputs()
    with torch.autocast("cpu"):
        mixed = semantic_cross_attention(query.half(), key, value.bfloat16(), pixels, LAYOUT)
        wide = semantic_cross_attention(query.double(), key.double(), value.double(), pixels, LAYOUT)
        with torch.autocast("cpu", enabled=False):
            untouched = semantic_cross_attention(query, key, value, pixels, LAYOUT)
    assert (mixed.dtype, wide.dtype, untouched.dtype) == (torch.bfloat16, torch.float64, torch.float32)


@pytest.mark.compiled
def test_autocast_when_compiled(graphs):
    pixels, inputs = make_inputs()
    with torch.autocast("cpu"):
        expected = gradients(with_argument, pixels, *inputs, inputs=inputs)
        assert expected[0].dtype == torch.bfloat16
        assert_equal(gradients(compiled(with_argument), pixels, *inputs, inputs=inputs), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    pixels, inputs = make_inputs()

    def recomputed(*inputs: Tensor) -> Tensor:
        return checkpoint(with_work_around_it, pixels, *inputs, use_reentrant=use_reentrant)

    expected = gradients(with_work_around_it, pixels, *inputs, inputs=inputs)
    out = recomputed(*inputs)
    weights = torch.linspace(-1, 2, out.numel()).view_as(out)
    (out * weights).sum().backward()
    assert_equal([out.detach(), *(tensor.grad for tensor in inputs)], expected)


@combination
def test_without_gradients(combination):
    problem = make_problem(*COMBINATIONS[combination])
    expected = solve(problem, "cpu")
    inputs = [tensor.requires_grad_() for tensor in problem.inputs]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, lse = semantic_cross_attention(*inputs, problem.query_tokens, problem.key_tokens, return_lse=True)
        assert not out.requires_grad and not lse.requires_grad
        assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)
    out = semantic_cross_attention(*inputs, problem.query_tokens, problem.key_tokens)
    assert out.requires_grad


def test_everything_made_in_inference_mode():
    with torch.inference_mode():
        pixels, inputs = make_inputs()
        out = semantic_cross_attention(*(tensor.clone() for tensor in inputs), pixels, LAYOUT)
    assert out.is_inference()
    expected_pixels, inputs = make_inputs()
    assert torch.equal(out.clone(), semantic_cross_attention(*inputs, expected_pixels, LAYOUT).detach())


@pytest.mark.parametrize("remembered", ["label map", "layout"])
def test_what_inference_mode_remembers_serves_training(remembered):
    """Validation before training: plans and layouts are remembered, and must not be tensors of inference mode."""
    pixels = random_map(2, 6, 7, 4)
    layout = LatentLayout((3, 1, 0, 2) if remembered == "label map" else (5, 1, 4, 2))  # the latter only here
    inputs = [tensor.requires_grad_() for tensor in make_problem(pixels, layout).inputs]
    if remembered == "label map":
        pixels_of_training = pixels
        semantic_cross_attention(*inputs, random_map(2, 6, 7, 4), layout)
    else:
        pixels_of_training = LabelMap(pixels.labels.clone(), pixels.num_labels)
    with torch.inference_mode():
        expected = semantic_cross_attention(*inputs, pixels, layout)
    out = semantic_cross_attention(*inputs, pixels_of_training, layout)
    assert torch.equal(out.detach(), expected)
    assert all(gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))


@combination
@pytest.mark.parametrize("empty", ["uniform", "zero"])
def test_reference_is_twice_differentiable(combination, empty):
    pixels, more_pixels = label_map([[0, 1, -1]], 3), label_map([[1, 0]], 3)
    latents, more_latents = LatentLayout((2, 0, 1)), LatentLayout((1, 1, 0))
    query_tokens, key_tokens = combine(combination, pixels, more_pixels, latents, more_latents)
    problem = make_problem(query_tokens, key_tokens, batch=1, heads=1, key_width=2, value_width=2, dtype=torch.float64)

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with sca_kernels.backend("reference"):
            out, lse = semantic_cross_attention(*inputs, query_tokens, key_tokens, empty=empty, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    inputs = [tensor.requires_grad_() for tensor in problem.inputs]
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


def test_gradient_penalty_on_the_reference():
    """What ``create_graph=True`` is for."""
    pixels, inputs = make_inputs()
    with sca_kernels.backend("reference"):
        out = with_argument(pixels, *inputs)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    gradient.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any() for tensor in inputs)


def test_backward_twice_over_a_kept_graph():
    pixels, inputs = make_inputs()
    out = with_argument(pixels, *inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert_equal(list(torch.autograd.grad(out.sum(), inputs)), list(first))


def test_inputs_changed_before_backward_are_noticed():
    pixels, inputs = make_inputs()
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    doubled = [tensor * 2 for tensor in inputs]
    out = with_argument(pixels, *doubled)
    doubled[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_uses_the_backend_of_forward(monkeypatch):
    """Wherever it runs: on another thread the choice of this one is not known, and another may be in force."""
    asked_for = []
    find = backends.implementation

    def implementation(operator: str, name: str) -> Callable[..., Any]:
        asked_for.append((operator, name))
        return find(operator, name)

    pixels, inputs = make_inputs()
    expected = gradients(with_argument, pixels, *inputs, inputs=inputs)
    monkeypatch.setattr(backends, "implementation", implementation)
    with sca_kernels.backend("cpu"):
        out = with_argument(pixels, *inputs)
    number = (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()
    found: list[Tensor] = []

    def differentiate() -> None:
        with sca_kernels.backend("reference"):
            found.extend(torch.autograd.grad(number, inputs))

    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    assert_equal([out.detach(), *found], expected)
    assert asked_for == [("semantic_cross_attention", "cpu"), ("semantic_cross_attention_backward", "cpu")]


def test_calls_from_several_threads():
    """Each gets its own results, and its own choice of backend; they share a label map that has no plan yet."""
    pixels, inputs = make_inputs()
    expected = gradients(with_argument, pixels, *inputs, inputs=inputs)
    fresh = LabelMap(pixels.labels.clone(), pixels.num_labels)
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            # Leaves of its own: PyTorch 2.13 can deadlock where a leaf enters a built-in operator on one thread and an
            # autograd.Function on another, each holding one of its gradient's lock and the interpreter's.
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            for _ in range(20):
                with sca_kernels.backend(name):
                    results = gradients(with_argument, fresh, *leaves, inputs=leaves)
                for got, wanted in zip(results, expected, strict=True):
                    torch.testing.assert_close(got, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cpu", "reference", "cpu", "cpu")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_dispatch_mode_sees_the_operators():
    """What flop counters and tracers are made of: no call of the kernels goes past it."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append(operator)
            return operator(*arguments, **(options or {}))

    pixels, inputs = make_inputs()
    pixels.at(6, 7)
    expected = gradients(with_argument, pixels, *inputs, inputs=inputs)
    with Recorder():
        assert_equal(gradients(with_argument, pixels, *inputs, inputs=inputs), expected)
    assert OPERATOR in seen and BACKWARD_OPERATOR in seen


ZERO_TENSORS = """
import torch
from tokens import COMBINATIONS, assert_same_bits, make_problem, solve

problem = make_problem(*COMBINATIONS["pixel-latent"])
for name in ("query", "key", "value", "grad_out"):
    zero = torch._efficientzerotensor(getattr(problem, name).shape)
    expected = solve(problem.changed(**{name: torch.zeros(zero.shape)}), "cpu")
    assert_same_bits(solve(problem.changed(**{name: zero}), "cpu"), expected)
"""


@pytest.mark.subprocess
def test_zeros_without_memory():
    """Derivatives that are zero may be tensors without memory; in its own process, since reading them would end it."""
    result = subprocess.run(
        [sys.executable, "-c", ZERO_TENSORS], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"


@combination
def test_saved_for_backward(combination):
    """The inputs, lse, the output where the keys are pixels, and of integers no more than one per token."""
    query_tokens, key_tokens = COMBINATIONS[combination]
    problem = make_problem(query_tokens, key_tokens)
    inputs = [tensor.requires_grad_() for tensor in problem.inputs]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sca_kernels.backend("cpu"):
        out, lse = semantic_cross_attention(*inputs, query_tokens, key_tokens, return_lse=True)
    expected = [*inputs, lse] + ([out] if isinstance(key_tokens, LabelMap) else [])
    floats = [tensor for tensor in saved if tensor.is_floating_point()]
    assert sorted(tensor.data_ptr() for tensor in floats) == sorted(tensor.data_ptr() for tensor in expected)
    integers = sum(tensor.numel() for tensor in saved if not tensor.is_floating_point())
    tokens = 2 * (out.shape[2] + inputs[1].shape[2])
    assert integers <= tokens + 4 * (query_tokens.num_labels + 1)


class Samples(Dataset[tuple[Tensor, LabelMap]]):
    """Uses the kernels where samples are made: in a worker process."""

    def __init__(self, pixels: LabelMap, inputs: list[Tensor]) -> None:
        self.pixels, self.inputs = pixels, inputs

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, LabelMap]:
        inputs = [tensor.clone().requires_grad_() for tensor in self.inputs]
        fresh = LabelMap(self.pixels.labels.clone(), self.pixels.num_labels)
        with sca_kernels.backend("cpu"):
            results = gradients(with_argument, fresh, *inputs, inputs=inputs)
        return torch.cat([result.flatten() for result in results]), fresh


@pytest.mark.subprocess
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_in_a_data_loader_worker_after_use_in_the_parent(use_threads):
    """A process forked from one that has run OpenMP regions hangs in its own first region."""
    use_threads(2)
    pixels, inputs = make_inputs(64, 64)
    expected = gradients(with_argument, pixels, *inputs, inputs=inputs)
    samples = Samples(pixels, [tensor.detach() for tensor in inputs])
    loader = DataLoader(samples, batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=60)
    ((results, maps),) = list(loader)
    assert maps.batch == 4
    for result in results:
        assert torch.equal(result, torch.cat([tensor.flatten() for tensor in expected]))
    assert_equal(gradients(with_argument, pixels, *inputs, inputs=inputs), expected)
