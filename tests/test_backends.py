"""Which backend serves a call, how one is forced, and what a process without the compiled kernels does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs

import sca_kernels
from sca_kernels import LatentLayout, backend, backends, cpu, semantic_cross_attention, triton

ROOT = Path(__file__).resolve().parents[1]
OPERATOR = "semantic_cross_attention"
CPU = torch.device("cpu")
LAYOUT = LatentLayout((2, 0, 3))


def resolve(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str:
    return backends.resolve(OPERATOR, device, dtype)


def attend(tokens: Tensor) -> Tensor:
    return semantic_cross_attention(tokens, tokens, tokens, LAYOUT, LAYOUT)


def tokens(**options: Any) -> Tensor:
    return torch.randn(2, 1, LAYOUT.count, 4, **options)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (operator, backend) of each call of an implementation."""
    calls: list[tuple[str, str]] = []
    implementation = backends.implementation

    def follow(operator: str, name: str) -> Callable[..., Any]:
        calls.append((operator, name))
        return implementation(operator, name)

    monkeypatch.setattr(backends, "implementation", follow)
    return calls


@pytest.fixture
def broken_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which the compiled kernels cannot run."""
    broken = dataclasses.replace(backends.BACKENDS["cpu"], why_not=lambda: "the moon is full")
    monkeypatch.setitem(backends.BACKENDS, "cpu", broken)
    monkeypatch.setattr(backends, "_defaults", {})


@pytest.mark.skipif(triton.INTERPRETED or triton._reason is not None, reason="Triton itself decides")
@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "capability 8.0 or more, and this one has 7.5"), ((8, 0), None)]
)
def test_triton_needs_a_gpu_that_it_supports(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = triton.why_not()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.skipif(bool(os.environ.get("SCA_BACKEND")), reason="SCA_BACKEND forces a backend on the whole process")
class TestDefault:
    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_compiled_kernels_on_the_cpu(self, dtype: torch.dtype) -> None:
        assert resolve(CPU, dtype) == "cpu"

    @pytest.mark.usefixtures("native")
    def test_plans_are_compiled_on_the_cpu(self) -> None:
        assert backends.resolve("label_plan", CPU, torch.int32) == "cpu"

    @pytest.mark.parametrize("device", ["meta", "cuda", "mps"])
    def test_reference_elsewhere(self, device: str) -> None:
        assert resolve(torch.device(device)) == "reference"

    def test_reference_for_an_operator_without_a_preference(self) -> None:
        assert backends.resolve("another_operator", CPU, torch.float32) == "reference"

    @pytest.mark.usefixtures("broken_cpu")
    def test_reference_where_the_kernels_cannot_run(self, served: list[tuple[str, str]]) -> None:
        assert resolve() == "reference"
        attend(tokens())
        assert served == []


class TestForced:
    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize(("name", "calls"), [("cpu", [(OPERATOR, "cpu")]), ("reference", [])])
    def test_context_manager(self, name: str, calls: list[tuple[str, str]], served: list[tuple[str, str]]) -> None:
        with backend(name):
            assert resolve() == name
            attend(tokens())
        assert served == calls

    @pytest.mark.usefixtures("native")
    def test_nested(self) -> None:
        before = resolve()
        with backend("reference"):
            with backend("cpu"):
                assert resolve() == "cpu"
                with backend("reference"):
                    assert resolve() == "reference"
                assert resolve() == "cpu"
            assert resolve() == "reference"
        assert resolve() == before

    @pytest.mark.usefixtures("native")
    def test_one_object_used_twice(self) -> None:
        before, forced = resolve(), backend("reference")
        with forced:
            with backend("cpu"), forced:
                assert resolve() == "reference"
            assert resolve() == "reference"
        assert resolve() == before

    def test_an_exception_ends_it(self) -> None:
        before = resolve()
        with pytest.raises(KeyError), backend("reference"):
            raise KeyError
        assert resolve() == before

    def test_making_one_changes_nothing(self) -> None:
        before = resolve()
        backend("reference")
        assert resolve() == before

    @pytest.mark.parametrize("name", ["nonsense", "", "CPU"])
    def test_unknown_name(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"backend: expected one of reference, cpu.*, got {name!r}"):
            backend(name)

    @pytest.mark.usefixtures("native")
    def test_other_threads_are_not_concerned(self) -> None:
        seen: dict[str, str] = {}
        inside, outside = threading.Event(), threading.Event()

        def work() -> None:
            seen["before"] = resolve()
            with backend("cpu"):
                inside.set()
                assert outside.wait(60)
                seen["inside"] = resolve()
            seen["after"] = resolve()

        before = resolve()
        with backend("reference"):
            thread = threading.Thread(target=work)
            thread.start()
            assert inside.wait(60)
            assert resolve() == "reference"
            outside.set()
            thread.join(60)
        assert seen == {"before": before, "inside": "cpu", "after": before}

    @pytest.mark.usefixtures("native")
    def test_backward_uses_the_backend_of_forward(self, served: list[tuple[str, str]]) -> None:
        for forward, backward, calls in (("cpu", "reference", 2), ("reference", "cpu", 0)):
            served.clear()
            leaf = tokens(requires_grad=True)
            with backend(forward):
                out = attend(leaf)
            with backend(backward):
                out.sum().backward()
            assert served == [(OPERATOR, "cpu"), (f"{OPERATOR}_backward", "cpu")][:calls]
            assert leaf.grad is not None

    @pytest.mark.compiled
    @pytest.mark.usefixtures("native")
    def test_compiled_code_asks_again(self) -> None:
        recorder = EagerAndRecordGraphs()
        torch.compiler.reset()
        function = torch.compile(attend, fullgraph=True, backend=recorder)
        leaf = tokens()
        for name in ("cpu", "reference", "cpu"):
            with backend(name):
                torch.testing.assert_close(function(leaf), attend(leaf))
        assert [f"sca.{OPERATOR}" in graph.code for graph in recorder.graphs] == [True, False]

    @pytest.mark.compiled
    def test_inside_compiled_code(self) -> None:
        def function(leaf: Tensor) -> Tensor:
            with backend("reference"):
                return attend(leaf)

        recorder = EagerAndRecordGraphs()
        torch.compiler.reset()
        before, leaf = resolve(), tokens()
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend=recorder)(leaf), function(leaf))
        assert f"sca.{OPERATOR}" not in recorder.graphs[0].code
        assert resolve() == before


class TestCannotServe:
    @pytest.mark.usefixtures("native")
    def test_device(self) -> None:
        message = f"backend 'cpu' cannot serve {OPERATOR} on meta in torch.float32: it runs on cpu, not on meta"
        with backend("cpu"), pytest.raises(RuntimeError, match=message):
            attend(tokens(device="meta"))

    @pytest.mark.usefixtures("broken_cpu")
    def test_process(self) -> None:
        message = f"backend 'cpu' cannot serve {OPERATOR} on cpu in torch.float64: the moon is full"
        with backend("cpu"), pytest.raises(RuntimeError, match=message):
            attend(tokens(dtype=torch.float64))

    @pytest.mark.usefixtures("native")
    def test_operator(self) -> None:
        message = "backend 'cpu' cannot serve another_operator on cpu in torch.float32: it has no another_operator"
        with backend("cpu"), pytest.raises(RuntimeError, match=message):
            backends.resolve("another_operator", CPU, torch.float32)

    @pytest.mark.usefixtures("native")
    def test_type(self) -> None:
        message = "on cpu in torch.float8_e4m3fn: it does not compute in torch.float8_e4m3fn"
        with backend("cpu"), pytest.raises(RuntimeError, match=message):
            resolve(CPU, torch.float8_e4m3fn)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_reference_serves_every_device(self, device: str) -> None:
        with backend("reference"):
            out = attend(tokens(device=device))
        assert out.device.type == device
        assert out.shape == (2, 1, LAYOUT.count, 4)


@pytest.mark.usefixtures("native")
class TestCapability:
    def test_set(self, capability: str) -> None:
        assert cpu.CAPABILITIES[cpu.capability()] == capability

    def test_baseline_is_always_there_and_the_best_is_used(self) -> None:
        assert cpu.capabilities()[0] == "baseline"
        if not os.environ.get("SCA_CPU_CAPABILITY"):
            assert cpu.CAPABILITIES[cpu.capability()] == cpu.capabilities()[-1]

    def test_unknown(self) -> None:
        before = cpu.capability()
        with pytest.raises(ValueError, match=r"name: expected one of baseline.*, got 'sse9'"):
            cpu.set_capability("sse9")
        assert cpu.capability() == before


# What a process with some environment says of itself; each attempt is its result, or the error.
FACTS = """
import json, sys
import torch
if {without_native}:
    sys.modules["sca_kernels._native"] = None  # what import finds where the file is missing
import sca_kernels
from sca_kernels import LabelMap, LatentLayout, backend, backends, cpu, semantic_cross_attention
from sca_kernels.__main__ import report

def attempt(function):
    try:
        return str(function())
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"

def attend():
    query, key = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 5, 4)
    label_map = LabelMap.from_labels(torch.tensor([[0, 1, 2], [2, -1, 0]]), 3)
    arguments = query, key, key, label_map, LatentLayout((2, 0, 3))
    out = semantic_cross_attention(*arguments)
    with backend("reference"):
        assert torch.allclose(out, semantic_cross_attention(*arguments), atol=1e-6)
    return "correct"

def forced():
    with backend("cpu"):
        return attend()

print(json.dumps({{
    "why_not": cpu.why_not(),
    "capability": cpu.CAPABILITIES[cpu.capability()],
    "resolved": attempt(lambda: backends.resolve("semantic_cross_attention", torch.device("cpu"), torch.float32)),
    "attention": attempt(attend),
    "forced": attempt(forced),
    "report": report(),
}}))
"""


def run_python(*arguments: str, **environment: str) -> str:
    """The output of another Python process, which knows of no settings but those given, and must end well."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("SCA_") or name == "SCA_NATIVE_PATH"
    }
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env={**inherited, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def facts(*, without_native: bool = False, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_python("-c", FACTS.format(without_native=without_native), **environment))
    return found


@pytest.mark.subprocess
class TestProcess:
    @pytest.mark.usefixtures("native")
    def test_capability_is_forced(self, capability: str) -> None:
        found = facts(SCA_CPU_CAPABILITY=capability)
        assert (found["why_not"], found["capability"], found["resolved"]) == (None, capability, "cpu")
        assert found["attention"] == found["forced"] == "correct"
        assert f"in use: {capability}" in found["report"]

    @pytest.mark.usefixtures("native")
    def test_unknown_capability(self) -> None:
        found = facts(SCA_CPU_CAPABILITY="sse9")
        reason = "SCA_CPU_CAPABILITY: expected one of baseline, avx2, avx512, got 'sse9'"
        assert_without_kernels(found, reason)

    def test_no_library(self) -> None:
        found = facts(without_native=True, SCA_NATIVE_PATH="")
        assert_without_kernels(found, "the compiled library is not part of this installation")
        assert "no compiled kernels" in found["report"]

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("broken.so", b"\x7fELF and then nothing", "the compiled library cannot be loaded: "),
            ("absent.so", None, "the compiled library cannot be loaded: "),
            ("library.txt", b"not even the name of a module", "is not an extension module"),
        ],
        ids=["broken", "absent", "text"],
    )
    def test_broken_library(self, tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        found = facts(SCA_NATIVE_PATH=str(path))
        assert_without_kernels(found, reason)
        assert str(path) in found["why_not"]

    @pytest.mark.usefixtures("native")
    def test_backend_is_forced(self) -> None:
        found = facts(SCA_BACKEND="reference")
        assert (found["resolved"], found["attention"], found["forced"]) == ("reference", "correct", "correct")

    def test_backend_is_forced_and_cannot_serve(self) -> None:
        found = facts(without_native=True, SCA_NATIVE_PATH="", SCA_BACKEND="cpu")
        for call in ("resolved", "attention", "forced"):
            assert found[call].startswith(
                f"RuntimeError: backend 'cpu' cannot serve {OPERATOR} on cpu in torch.float32: the compiled library"
            )

    def test_unknown_backend(self) -> None:
        found = facts(SCA_BACKEND="nonsense")
        for call in ("resolved", "attention"):
            names = ", ".join(backends.BACKENDS)
            assert found[call] == f"ValueError: SCA_BACKEND: expected one of {names}, got 'nonsense'"

    def test_report(self) -> None:
        report = run_python("-m", "sca_kernels")
        for text in (sca_kernels.__version__, torch.__version__, f"{sys.version_info.major}.{sys.version_info.minor}"):
            assert text in report
        for name, known in backends.BACKENDS.items():
            (line,) = (line for line in report.splitlines() if line.split()[:1] == [name] and known.summary in line)
            reason = known.why_not()
            assert ("available" if reason is None else f"not available: {reason}") in line
        assert ", ".join(cpu.capabilities()) in report


def assert_without_kernels(found: dict[str, Any], reason: str) -> None:
    """Everything works but a forced ``cpu``, which says why not."""
    assert reason in found["why_not"]
    assert (found["resolved"], found["attention"]) == ("reference", "correct")
    assert found["forced"] == (
        f"RuntimeError: backend 'cpu' cannot serve {OPERATOR} on cpu in torch.float32: {found['why_not']}"
    )
    assert f"not available: {found['why_not']}" in found["report"]
