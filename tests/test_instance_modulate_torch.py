"""instance_modulate inside PyTorch: compilation, export, autocast, checkpoints, modes, other threads and processes."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folded import assert_same_bits, channels_last
from instances import CASES, DTYPES, MEMORY, Problem, call, differentiate, leaves, make_problem, solve
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sca_kernels
from sca_kernels import backends, instance_modulate

pytestmark = pytest.mark.usefixtures("native")

case = pytest.mark.parametrize("case", CASES)
# All gradients that there are, from parameters per pixel and per channel.
full_case = pytest.mark.parametrize("case", ["full maps", "full channels"])
FULL: dict[str, dict[str, Any]] = {
    "full maps": {"gamma": "pixel", "beta": "pixel", "stats": True, "noise": "per_pixel", "strength": True},
    "full channels": {"gamma": "channel", "beta": "channel", "stats": True, "noise": "per_element", "strength": True},
}

OPERATOR = torch.ops.sca.instance_modulate.default
BACKWARD_OPERATOR = torch.ops.sca.instance_modulate_backward.default
TENSORS = ("x", "gamma", "beta", "mean", "rstd", "noise_strength")


def make(case: str, **arguments: Any) -> Problem:
    return make_problem(channels=8, **{**CASES, **FULL}[case], **arguments)


def operator_arguments(problem: Problem) -> list[Any]:
    """What the public function passes to the operator."""
    tensors, settings = dict(problem.tensors), problem.settings
    batch, channels = tensors["x"].shape[:2]
    noise = settings.get("noise")
    if noise is not None and "noise_strength" not in tensors:
        tensors["noise_strength"] = torch.ones(())
    for name, tensor in tensors.items():
        if tensor.dim() < 4:
            tensors[name] = tensor.expand(batch, channels)
        elif tensor.shape[0] != batch:
            tensors[name] = tensor.expand(batch, -1, -1, -1)
    return [
        *(tensors.get(name) for name in TENSORS[:5]),
        None if isinstance(noise, str) else noise,
        settings.get("noise_seed"),
        tensors.get("noise_strength"),
        settings.get("add_one", True),
        settings.get("unbiased", False),
        settings.get("eps", 1e-5),
        settings.get("negative_slope", 0.2),
        "cpu",
    ]


@pytest.mark.compiled
@case
def test_opcheck(case):
    problem = make(case)
    arguments = operator_arguments(problem)
    differentiable = {*range(5), 7}
    given = [
        value.clone().requires_grad_() if place in differentiable and value is not None else value
        for place, value in enumerate(arguments)
    ]
    torch.library.opcheck(OPERATOR, given)
    last = operator_arguments(problem.arranged(channels_last))
    torch.library.opcheck(OPERATOR, last, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.compiled
@case
@pytest.mark.parametrize("every", [1, 2])
def test_opcheck_of_backward(case, every):
    """With all gradients asked for that there can be, and with some."""
    problem = make(case)
    arguments = operator_arguments(problem)
    _, stats = OPERATOR(*arguments)
    mask = [name in problem.tensors and place % every == 0 for place, name in enumerate(TENSORS)]
    tensors, settings = arguments[:8], arguments[8:]
    saved = [*tensors[:3], stats, *tensors[5:], tensors[3] is not None, *settings]
    torch.library.opcheck(BACKWARD_OPERATOR, [problem.grad_out, *saved, mask])
    torch.library.opcheck(
        BACKWARD_OPERATOR,
        [channels_last(problem.grad_out), *saved, mask],
        test_utils=("test_schema", "test_faketensor"),
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


def run(function: Callable[[dict[str, Tensor]], Tensor], problem: Problem) -> dict[str, Tensor]:
    inputs = leaves(problem)
    return differentiate(problem, function(inputs), inputs)


def program_of(problem: Problem) -> Callable[[dict[str, Tensor]], Tensor]:
    settings = problem.settings

    def program(tensors: dict[str, Tensor]) -> Tensor:
        rest = dict(tensors)
        stats = (rest.pop("mean"), rest.pop("rstd")) if "mean" in rest else None
        return instance_modulate(**rest, stats=stats, **settings)

    return program


@pytest.mark.compiled
@case
def test_compiled_equals_eager(graphs, case):
    for memory in MEMORY.values():
        problem = make(case).arranged(memory)
        program = program_of(problem)
        function = compiled(program)
        traced_first = run(function, problem)
        expected = run(program, problem)
        assert_same_bits(traced_first, expected)
        assert_same_bits(run(function, problem), expected)
        with torch.no_grad():
            assert torch.equal(function(dict(problem.tensors)), expected["out"])
    assert graphs and all(OPERATOR in graph for graph in graphs)


@pytest.mark.compiled
@full_case
def test_compiled_by_inductor_equals_eager(graphs, case):
    """Once through the default compiler, code generation included, with work around the operator."""
    problem = make(case)
    inner = program_of(problem)

    def program(tensors: dict[str, Tensor]) -> Tensor:
        return inner({**tensors, "x": tensors["x"].tanh()}).sin() * 2

    expected = run(program, problem)
    actual = run(torch.compile(program, fullgraph=True), problem)
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, msg=name)


@pytest.mark.compiled
def test_compiled_for_any_size(graphs):
    """Other heights, widths, batches and channels give the right results, and no error."""

    def problem_of(batch: int, channels: int, height: int, width: int) -> Problem:
        sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
        return make_problem(**sizes, gamma="pixel", beta="channel", noise="per_element")

    function = compiled(program_of(problem_of(2, 8, 6, 7)), dynamic=True)
    for sizes in ((2, 8, 6, 7), (2, 12, 9, 5), (3, 5, 40, 33), (2, 8, 6, 7)):
        these = problem_of(*sizes)
        assert_same_bits(run(function, these), run(program_of(these), these))


@pytest.mark.compiled
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_draws_noise_anew(graphs, compiler):
    """A seed is drawn with each call, in the graph, and so follows the generator; nothing in it is negative only."""
    x = torch.randn(1, 4, 5, 6)

    def program(x: Tensor) -> Tensor:
        return instance_modulate(x, noise="per_element")

    function = torch.compile(program, fullgraph=True, backend=compiler)
    torch.manual_seed(4)
    first, second = function(x), function(x)
    torch.manual_seed(4)
    assert torch.equal(function(x), first) and not torch.equal(first, second)
    if compiler == "aot_eager":
        torch.manual_seed(4)
        assert torch.equal(program(x), first)


@pytest.mark.compiled
def test_backend_forced_around_a_compiled_function(graphs):
    """The choice is that of the call, not that of the first call."""
    problem = make("maps")
    function = compiled(program_of(problem))
    for name in ("cpu", "reference", "cpu"):
        with sca_kernels.backend(name):
            function(dict(problem.tensors))
    assert [OPERATOR in graph for graph in graphs] == [True, False]


class Modulation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(1, 8)) for _ in range(2))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return instance_modulate(x, self.gamma, self.beta, noise=noise)


@pytest.mark.compiled
@pytest.mark.parametrize("strict", [False, True])
def test_export_is_saved_and_loaded_for_any_batch(strict):
    x, noise = torch.randn(2, 8, 7, 9), torch.randn(1, 1, 7, 9)
    module = Modulation()
    dynamic = {"x": {0: torch.export.Dim("batch", min=2)}, "noise": None}
    program = torch.export.export(module, (x, noise), dynamic_shapes=dynamic, strict=strict)
    assert any(node.target is OPERATOR for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (2, 3):
        x = torch.randn(batch, 8, 7, 9)
        assert torch.equal(loaded(x, noise), module(x, noise))


@full_case
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(case, backend, autocast_to):
    """Whatever the type of x, and in the backward pass too, where that is inside of it, which is unusual."""
    for dtype in DTYPES:
        problem = make(case, dtype=dtype)
        expected = solve(problem, backend)
        inputs = leaves(problem)
        with torch.autocast("cpu", dtype=autocast_to):
            with sca_kernels.backend(backend):
                out = call(problem, inputs)
            if backend == "cpu":
                assert_same_bits(solve(problem, backend), expected)
        assert_same_bits(differentiate(problem, out, inputs), expected)


@full_case
def test_without_gradients(case):
    problem = make(case)
    expected = solve(problem, "cpu")["out"]
    inputs = leaves(problem)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = call(problem, inputs)
        assert not out.requires_grad and torch.equal(out, expected)
    assert call(problem, inputs).requires_grad


@full_case
def test_checkpoint(case):
    """What is saved for the backward pass is made again, with the same noise."""
    problem = make(case)
    inputs = leaves(problem)
    names = list(inputs)
    out = checkpoint(
        lambda *tensors: call(problem, dict(zip(names, tensors, strict=True))), *inputs.values(), use_reentrant=False
    )
    assert_same_bits(differentiate(problem, out, inputs), solve(problem, "cpu"))


@full_case
def test_backward_uses_the_backend_of_forward(case, monkeypatch):
    """Wherever it runs: on another thread the choice of this one is not known, and another may be in force."""
    asked_for = []
    find = backends.implementation

    def implementation(name: str, backend: str) -> Callable[..., Any]:
        asked_for.append((name, backend))
        return find(name, backend)

    problem = make(case)
    expected = solve(problem, "cpu")
    monkeypatch.setattr(backends, "implementation", implementation)
    inputs = leaves(problem)
    with sca_kernels.backend("cpu"):
        out = call(problem, inputs)
    found: dict[str, Tensor] = {}

    def work() -> None:
        with sca_kernels.backend("reference"):
            found.update(differentiate(problem, out, inputs))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_bits(found, expected)
    assert asked_for == [("instance_modulate", "cpu"), ("instance_modulate_backward", "cpu")]


@full_case
def test_a_dispatch_mode_sees_the_operators(case):
    """What flop counters and tracers are made of: no call of the kernels goes past it."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append(operator)
            return operator(*arguments, **(options or {}))

    problem = make(case)
    expected = solve(problem, "cpu")
    with Recorder():
        assert_same_bits(solve(problem, "cpu"), expected)
    assert {OPERATOR, BACKWARD_OPERATOR} <= set(seen)


@full_case
def test_lazily_negated_tensors(case):
    """The imaginary part of a conjugate holds the numbers before the change of sign."""

    def negated(values: Mapping[str, Any]) -> dict[str, Tensor]:
        changed = {name: torch.complex(-value, -value).conj().imag for name, value in values.items()}
        assert all(value.is_neg() for value in changed.values())
        return changed

    problem = make(case)
    expected = solve(problem, "cpu")
    assert_same_bits(solve(problem.changed(tensors=negated(problem.tensors)), "cpu"), expected)
    assert_same_bits(solve(problem.changed(**negated({"grad_out": problem.grad_out})), "cpu"), expected)
    if case == "full maps":
        assert_same_bits(solve(problem.with_settings(**negated({"noise": problem.settings["noise"]})), "cpu"), expected)


@full_case
def test_sizes_under_fake_tensors(case):
    """Results of tensors that have sizes only, too large for any memory."""
    from torch._subclasses import FakeTensorMode

    small = make_problem(channels=1, **FULL[case])
    side = 2**18
    with FakeTensorMode() as mode:
        tensors = {}
        for name, tensor in small.tensors.items():
            shape = (*tensor.shape[:2], side, side) if tensor.dim() == 4 else tensor.shape
            tensors[name] = torch.empty(shape, requires_grad=True)
        settings = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in small.settings.items()
        }
        if case == "full maps":
            settings["noise"] = torch.empty(side, side)
        problem = small.changed(tensors=tensors, settings=settings)
        out = call(problem, tensors)
        assert out.shape == tensors["x"].shape and out.numel() > 2**31
        found = torch.autograd.grad(out.sum(), list(tensors.values()))
        assert [gradient.shape for gradient in found] == [tensor.shape for tensor in tensors.values()]


# Zeros without memory, then maps whose elements lie up to 2^31 elements apart, in one allocation. That is only a range
# of addresses until it is written to, so a few pages of memory are enough; the poison of the tests would write all of
# it.
ADDRESSES = """
import sys
import torch
from folded import assert_same_bits
from instances import CASES, assert_accurate, away_from_kink, expect, make_problem, solve

problem = make_problem(stats=True, **CASES["maps"])
for name, value in problem.tensors.items():
    expected = solve(problem.with_tensors(**{name: torch.zeros(value.shape)}), "cpu")
    assert_same_bits(solve(problem.with_tensors(**{name: torch._efficientzerotensor(value.shape)}), "cpu"), expected)
zeros = problem.changed(grad_out=torch._efficientzerotensor(problem.grad_out.shape))
assert not any(value.any() for name, value in solve(zeros, "cpu").items() if name != "out")

for dtype in (torch.float32, torch.bfloat16):
    try:
        memory = torch.empty(2**31 + 2**20, dtype=dtype)
    except RuntimeError as error:
        sys.exit(f"no memory: {error}")
    sizes = {"batch": 2, "channels": 16, "height": 3, "width": 5}
    problem = away_from_kink(make_problem(dtype=dtype, **sizes, **CASES["maps"]))
    expected = expect(problem)
    for dimension in range(4):
        def far(tensor, place):
            strides = list(tensor.stride())
            strides[dimension] = (2**31 + 2**16) // (tensor.shape[dimension] - 1)
            return memory.as_strided(tensor.shape, strides, place * 2**14).copy_(tensor)

        tensors = {name: far(problem.tensors[name], place) for place, name in enumerate(("x", "gamma", "beta"))}
        these = problem.with_tensors(**tensors).changed(grad_out=far(problem.grad_out, 3))
        assert_accurate(these, solve(these, "cpu"), expected)
    del memory
"""


@pytest.mark.subprocess
def test_addresses():
    """In a process of its own: reading zeros that have no memory, or at a wrong address, would end it."""
    result = subprocess.run(
        [sys.executable, "-c", ADDRESSES], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if result.stderr.startswith("no memory"):
        pytest.skip(result.stderr)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"
