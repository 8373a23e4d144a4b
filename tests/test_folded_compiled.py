"""semantic_pool and semantic_modulate through torch.compile and torch.export, and the checks of torch.library."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from folded import ALL_OPTIONS, BUILDERS, LAYOUT, POOL_BIASES, Problem, assert_same_bits, channels_last
from tokens import random_map
from torch import Tensor, nn

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, merge_pools, semantic_modulate, semantic_pool

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.compiled]

operator = pytest.mark.parametrize("operator", BUILDERS)

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "semantic_pool": [{"options": ()}, {"options": POOL_BIASES, "empty": "zero"}],
    "semantic_modulate": [
        {"options": (), "empty": "zero"},
        {"options": ALL_OPTIONS, "noise": "per_pixel"},
        {"options": ("key_bias", "scale_bias"), "noise": "per_element", "add_one": False, "negative_slope": 1.0},
    ],
}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in range(len(variants))]
case = pytest.mark.parametrize(("operator", "variant"), CASES)


def make(operator: str, variant: int = 1, **arguments: Any) -> Problem:
    return BUILDERS[operator](**{"channels": 8, **VARIANTS[operator][variant], **arguments})


def overload(operator: str, *, backward: bool = False) -> Any:
    return getattr(torch.ops.sca, f"{operator}_backward" if backward else operator).default


def operator_arguments(problem: Problem) -> list[Any]:
    """What the public function passes to the operator."""
    plan = problem.labels.planned().plan
    assert plan is not None
    tensors, settings = problem.tensors, problem.settings
    grouping = [problem.layout.offsets(torch.device("cpu")), plan.offsets, plan.order]
    max_latents, empty = problem.layout.max_per_label, settings.get("empty", "uniform")
    if problem.operator == "semantic_pool":
        biases = [tensors.get(name) for name in POOL_BIASES]
        return [tensors["queries"], tensors["x"], *grouping, *biases, max_latents, empty, "cpu"]
    noise, seed = settings.get("noise"), settings.get("noise_seed")
    rest = [1e-5, settings.get("negative_slope", 0.2), settings.get("add_one", True), empty, "cpu"]
    strength = (
        torch.ones(2, 8) if noise is not None and "noise_strength" not in tensors else tensors.get("noise_strength")
    )
    return [
        *(tensors[name] for name in ("x", "keys", "scale", "shift")),
        *grouping,
        *(tensors.get(name) for name in ALL_OPTIONS[:-1]),
        None if isinstance(noise, str) else noise,
        seed,
        strength,
        max_latents,
        *rest,
    ]


def backward_arguments(problem: Problem, mask: list[bool]) -> list[Any]:
    arguments = operator_arguments(problem)
    results = overload(problem.operator)(*arguments)
    if problem.operator == "semantic_pool":
        return [*problem.gradients.values(), *arguments[:2], *results, *arguments[2:], mask]
    tensors, settings = arguments[:19], arguments[19:]
    _, stats = results
    given = tensors[14] is not None
    return [problem.gradients["out"], *tensors[:14], stats, *tensors[16:], given, *settings, mask]


@case
def test_opcheck(operator, variant):
    problem = make(operator, variant)
    arguments = operator_arguments(problem)
    leaves = [
        value.clone().requires_grad_() if any(value is tensor for tensor in problem.tensors.values()) else value
        for value in arguments
    ]
    torch.library.opcheck(overload(operator), leaves)
    last = make(operator, variant)
    last = last.with_tensors(x=channels_last(last.tensors["x"]))
    torch.library.opcheck(overload(operator), operator_arguments(last), test_utils=("test_schema", "test_faketensor"))


@case
@pytest.mark.parametrize("every", [1, 2])
def test_opcheck_of_backward(operator, variant, every):
    """With all gradients asked for that there can be, and with some."""
    problem = make(operator, variant)
    given = (
        ("queries", "x", *POOL_BIASES) if operator == "semantic_pool" else ("x", "keys", "scale", "shift", *ALL_OPTIONS)
    )
    mask = [name in problem.tensors and place % every == 0 for place, name in enumerate(given)]
    arguments = backward_arguments(problem, mask)
    torch.library.opcheck(overload(operator, backward=True), arguments)
    if operator == "semantic_pool":
        some = [value if place % 2 else None for place, value in enumerate(arguments[:6])]
        torch.library.opcheck(
            overload(operator, backward=True), [*some, *arguments[6:]], test_utils=("test_schema", "test_faketensor")
        )


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


def run(function: Callable[..., dict[str, Tensor]], problem: Problem) -> dict[str, Tensor | None]:
    """Results and gradients of a function of the label map and the tensors."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}
    results = function(problem.labels, inputs)
    flows = [problem.gradients[name] for name in results]
    found = torch.autograd.grad(list(results.values()), list(inputs.values()), flows)
    return {
        **{name: result.detach() for name, result in results.items()},
        **{f"grad_{name}": gradient for name, gradient in zip(inputs, found, strict=True)},
    }


def program_of(problem: Problem) -> Callable[[LabelMap, dict[str, Tensor]], dict[str, Tensor]]:
    settings, layout, operator = problem.settings, problem.layout, problem.operator

    def program(labels: LabelMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if operator == "semantic_pool":
            return semantic_pool(layout=layout, labels=labels, **tensors, **settings)._asdict()
        rest = dict(tensors)
        if "mean" in rest:
            rest["stats"] = (rest.pop("mean"), rest.pop("rstd"))
        return {"out": semantic_modulate(layout=layout, labels=labels, **rest, **settings)}

    return program


@case
def test_compiled_equals_eager(graphs, operator, variant):
    """In both orders, since what is remembered about a label map must not come from a trace."""
    problem = make(operator, variant, labels=random_map(2, 7, 9, 5, seed=6))
    memory = (torch.clone, channels_last)[variant % 2]
    problem = problem.with_tensors(x=memory(problem.tensors["x"]))
    program = program_of(problem)
    function = compiled(program)
    traced_first = run(function, problem)
    expected = run(program, problem)
    assert_same_bits(traced_first, expected)
    assert_same_bits(run(function, problem), expected)
    fresh = problem.changed(labels=LabelMap(problem.labels.labels.clone(), 5))
    assert_same_bits(run(function, fresh), expected)
    assert_same_bits(run(program, fresh), expected)
    assert_same_bits(run(function, problem.changed(labels=problem.labels.planned())), expected)
    assert graphs and all(overload(operator) in graph for graph in graphs)


@operator
def test_compiled_without_gradients_equals_eager(graphs, operator):
    problem = make(operator)
    with torch.no_grad():
        results = compiled(program_of(problem))(problem.labels, dict(problem.tensors))
        assert_same_bits(results, program_of(problem)(problem.labels, problem.tensors))


@operator
def test_compiled_with_everything_made_inside(graphs, operator):
    """The layout, the label map of a mask, another resolution of it, and a seed."""
    problem = make(operator, options=())
    problem = problem.changed(settings={})

    def program(labels: LabelMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = labels.labels.unsqueeze(1) == torch.arange(5).view(5, 1, 1)
        inside = LabelMap.from_mask(mask).at(5, 6).at(7, 9)
        layout = LatentLayout((3, 1, 0, 2, 5))
        if operator == "semantic_pool":
            return {"pooled": semantic_pool(layout=layout, labels=inside, **tensors).pooled}
        return {"out": semantic_modulate(layout=layout, labels=inside, **tensors)}

    assert_same_bits(run(compiled(program), problem), run(program, problem))


@operator
def test_compiled_by_inductor_equals_eager(graphs, operator):
    """Once through the default compiler, code generation included, with work around the operator."""
    problem = make(operator)
    inner = program_of(problem)

    def program(labels: LabelMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        results = inner(labels, {**tensors, "x": tensors["x"].tanh()})
        return {name: result.masked_fill(result.isinf(), 0).relu() * 2 for name, result in results.items()}

    expected = run(program, problem)
    actual = run(torch.compile(program, fullgraph=True), problem)
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, msg=name)


@operator
def test_compiled_for_any_size(graphs, operator):
    """Other heights, widths, batches and channels give the right results, and no error."""

    def problem_of(height: int, width: int, batch: int, channels: int) -> Problem:
        labels = random_map(batch, height, width, 5)
        return make(operator, 0, labels=labels, batch=batch, channels=channels, options=("row_bias",))

    function = compiled(program_of(problem_of(6, 7, 2, 8)), dynamic=True)
    for sizes in ((6, 7, 2, 8), (9, 5, 2, 12), (40, 33, 3, 5), (6, 7, 2, 8)):
        these = problem_of(*sizes)
        assert_same_bits(run(function, these), run(program_of(these), these))


def test_compiled_draws_noise_anew(graphs):
    """A seed is drawn with each call, in the graph, and so follows the generator."""
    problem = make("semantic_modulate", 2).with_settings(noise_seed=None)
    function = compiled(program_of(problem))
    torch.manual_seed(4)
    first, second = (function(problem.labels, problem.tensors)["out"] for _ in range(2))
    torch.manual_seed(4)
    again = function(problem.labels, problem.tensors)["out"]
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(program_of(problem)(problem.labels, problem.tensors)["out"], first)


@operator
def test_autocast_when_compiled(graphs, operator):
    problem = make(operator)
    expected = run(program_of(problem), problem)
    with torch.autocast("cpu"):
        assert_same_bits(run(compiled(program_of(problem)), problem), expected)


@operator
def test_backend_forced_around_a_compiled_function(graphs, operator):
    """The choice is that of the call, not that of the first call."""
    problem = make(operator)
    function = compiled(program_of(problem))
    order = ("cpu", "reference", "cpu")
    for name in order:
        with sca_kernels.backend(name):
            function(problem.labels, dict(problem.tensors))
    assert [overload(operator) in graph for graph in graphs] == [name == "cpu" for name in order[:2]]


def test_merged_pools_in_a_graph(graphs):
    problem = make("semantic_pool", options=())
    problem = problem.changed(settings={})

    def program(labels: LabelMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = [
            semantic_pool(
                tensors["queries"],
                tensors["x"][..., columns],
                LAYOUT,
                LabelMap(labels.labels[..., columns].contiguous(), 5),
                empty="zero",
            )
            for columns in (slice(0, 4), slice(4, 9))
        ]
        return merge_pools(parts, [(0, 0), (0, 4)], (7, 9))._asdict()

    assert_same_bits(run(compiled(program), problem), run(program, problem))


class Module(nn.Module):
    """Either operator, with rows of its own for each head and latent."""

    def __init__(self, operator: str, labels: LabelMap | None = None) -> None:
        super().__init__()
        self.operator, self.labels = operator, labels
        self.rows = nn.Parameter(torch.randn(1, 2, LAYOUT.count, 8))

    def forward(self, x: Tensor, labels: LabelMap | None = None) -> Tensor:
        labels = self.labels if labels is None else labels
        assert labels is not None
        rows = self.rows.expand(x.shape[0], -1, -1, -1)
        if self.operator == "semantic_pool":
            return semantic_pool(rows, x, LAYOUT, labels).pooled
        return semantic_modulate(x, rows, rows, rows, LAYOUT, labels)


@operator
@pytest.mark.parametrize(("held", "strict"), [("argument", True), ("argument", False), ("attribute", False)])
def test_export(operator, held, strict):
    """The exported program equals the module, and the module with the same label map still works eagerly."""
    labels, x = random_map(2, 7, 9, 5), torch.randn(2, 8, 7, 9)
    module = Module(operator, labels if held == "attribute" else None)
    arguments = (x,) if held == "attribute" else (x, labels)
    program = torch.export.export(module, arguments, strict=strict)
    expected = module(*arguments)
    assert torch.equal(program.module()(*arguments), expected)
    assert any(node.target is overload(operator) for node in program.graph.nodes)
    assert torch.equal(module(*arguments), expected)


@operator
def test_export_is_saved_and_loaded_for_any_batch(operator):
    labels, x = random_map(2, 7, 9, 5), torch.randn(2, 8, 7, 9)
    module = Module(operator)
    batch = torch.export.Dim("batch", min=2)
    dynamic = {"x": {0: batch}, "labels": [{0: batch}, None]}
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x, labels), dynamic_shapes=dynamic), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for images in (2, 3):
        labels, x = random_map(images, 7, 9, 5), torch.randn(images, 8, 7, 9)
        assert torch.equal(loaded(x, labels), module(x, labels))
