"""semantic_pool and semantic_modulate inside PyTorch: autocast, modes, devices, other threads and processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folded import (
    BUILDERS,
    LABELS,
    LAYOUT,
    apply,
    assert_same_bits,
    differentiate,
    full_problem,
    leaves,
    solve,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, backends

pytestmark = pytest.mark.usefixtures("native")

operator = pytest.mark.parametrize("operator", BUILDERS)
either_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


@operator
@either_backend
@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(operator, backend, autocast_to):
    """Whatever the type of x; nor does it change a backward pass inside of it, which is unusual, by the kernels."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        problem = full_problem(operator, dtype=dtype)
        expected = solve(problem, backend)
        inputs = leaves(problem)
        with torch.autocast("cpu", dtype=autocast_to):
            with sca_kernels.backend(backend):
                results = apply(problem, inputs)
            if backend == "cpu":
                assert_same_bits(solve(problem, backend), expected)
        assert_same_bits(differentiate(problem, results, inputs), expected)


@operator
def test_without_gradients(operator):
    problem = full_problem(operator)
    expected = {name: value for name, value in solve(problem, "cpu").items() if not name.startswith("grad_")}
    inputs = leaves(problem)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results = apply(problem, inputs)
        assert not any(result.requires_grad for result in results.values())
        assert_same_bits({name: result.clone() for name, result in results.items()}, expected)
    assert all(result.requires_grad for result in apply(problem, inputs).values())


@operator
def test_what_inference_mode_remembers_serves_training(operator):
    """Validation before training: plans and layouts are remembered, and must not be tensors of inference mode."""
    problem = full_problem(operator).changed(
        labels=LabelMap(LABELS.labels.clone(), 5), layout=LatentLayout(LAYOUT.latents_per_label)
    )
    with torch.inference_mode():
        apply(problem, problem.tensors)
    assert_same_bits(solve(problem, "cpu"), solve(full_problem(operator), "cpu"))


@operator
def test_backward_uses_the_backend_of_forward(operator, monkeypatch):
    """Wherever it runs: on another thread the choice of this one is not known, and another may be in force."""
    asked_for = []
    find = backends.implementation

    def implementation(name: str, backend: str) -> Callable[..., Any]:
        asked_for.append((name, backend))
        return find(name, backend)

    problem = full_problem(operator)
    expected = solve(problem, "cpu")
    monkeypatch.setattr(backends, "implementation", implementation)
    inputs = leaves(problem)
    with sca_kernels.backend("cpu"):
        results = apply(problem, inputs)
    found: dict[str, Tensor] = {}

    def work() -> None:
        with sca_kernels.backend("reference"):
            found.update(differentiate(problem, results, inputs))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_bits(found, expected)
    assert asked_for == [(operator, "cpu"), (f"{operator}_backward", "cpu")]


@operator
def test_calls_from_several_threads(operator):
    """Each gets its own results, and its own choice of backend; they share a label map that has no plan yet."""
    problem = full_problem(operator)
    expected = {backend: solve(problem, backend) for backend in ("cpu", "reference")}
    fresh = problem.changed(labels=LabelMap(LABELS.labels.clone(), 5))
    failures: list[BaseException] = []

    def work(backend: str) -> None:
        try:
            for _ in range(10):
                assert_same_bits(solve(fresh, backend), expected[backend])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cpu", "reference", "cpu", "cpu")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@operator
def test_a_dispatch_mode_sees_the_operators(operator):
    """What flop counters and tracers are made of: no call of the kernels goes past it."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append(operator)
            return operator(*arguments, **(options or {}))

    problem = full_problem(operator)
    expected = solve(problem, "cpu")
    with Recorder():
        assert_same_bits(solve(problem, "cpu"), expected)
    names = {str(target) for target in seen}
    assert {f"sca.{operator}.default", f"sca.{operator}_backward.default"} <= names


@operator
def test_lazily_negated_tensors(operator):
    """The imaginary part of a conjugate holds the numbers before the change of sign."""
    problem = full_problem(operator)

    def negated(values: Mapping[str, Tensor | None]) -> dict[str, Any]:
        changed = {name: torch.complex(-value, -value).conj().imag for name, value in values.items()}
        assert all(value.is_neg() for value in changed.values())
        return changed

    expected = solve(problem, "cpu")
    assert_same_bits(solve(problem.changed(tensors=negated(problem.tensors)), "cpu"), expected)
    assert_same_bits(solve(problem.changed(gradients=negated(problem.gradients)), "cpu"), expected)
    if "noise" in problem.settings:
        assert_same_bits(solve(problem.with_settings(**negated({"noise": problem.settings["noise"]})), "cpu"), expected)


@operator
def test_sizes_under_fake_tensors(operator):
    """Results of tensors that have sizes only, too large for any memory."""
    from torch._subclasses import FakeTensorMode

    heads, channels = 2**10, 2**20
    small = full_problem(operator, channels=1, heads=1)
    with FakeTensorMode() as mode:
        tensors = {}
        for name, tensor in small.tensors.items():
            shape = list(tensor.shape)
            if name == "x" or len(shape) == 2:
                shape[1] = channels
            else:
                shape[1] = heads
                if name in ("queries", "keys", "scale", "shift"):
                    shape[3] = channels
            tensors[name] = torch.empty(shape, dtype=tensor.dtype, requires_grad=True)
        settings = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in small.settings.items()
        }
        problem = small.changed(labels=LabelMap(mode.from_tensor(LABELS.labels), 5), tensors=tensors, settings=settings)
        results = apply(problem, tensors)
        if operator == "semantic_modulate":
            assert results["out"].shape == tensors["x"].shape
        else:
            assert results["pooled"].shape == tensors["queries"].shape and results["pooled"].numel() > 2**31
            assert results["row_mass"].shape == tensors["row_bias"].shape
            assert results["mean"].shape == (2, channels)
        found = torch.autograd.grad(sum(result.sum() for result in results.values()), list(tensors.values()))
        assert [gradient.shape for gradient in found] == [tensor.shape for tensor in tensors.values()]


@operator
def test_any_device_is_served_by_the_reference(operator):
    """Tensors that have sizes only: no kernel of this library knows their device."""
    problem = full_problem(operator)
    on_meta = problem.changed(
        labels=LABELS.to("meta"),
        settings={
            name: value.to("meta") if isinstance(value, Tensor) else value for name, value in problem.settings.items()
        },
    )
    results = apply(on_meta, {name: tensor.to("meta") for name, tensor in problem.tensors.items()})
    expected = apply(problem, problem.tensors)
    assert {name: result.shape for name, result in results.items()} == {
        name: result.shape for name, result in expected.items()
    }
    assert all(result.device.type == "meta" for result in results.values())


# Zeros without memory, then x and a gradient whose elements lie up to 2^31 elements apart, in one allocation. That is
# only a range of addresses until it is written to, so a few pages of memory are enough; the poison of the tests would
# write all of it.
ADDRESSES = """
import sys
import torch
from folded import ALL_OPTIONS, assert_accurate, assert_same_bits, away_from_kink, expect, modulate_problem
from folded import pool_problem, solve
from sca_kernels import LatentLayout
from tokens import random_map

for problem in (pool_problem(channels=5), modulate_problem(channels=5, options=ALL_OPTIONS, noise="per_pixel")):
    for change, values in ((problem.with_tensors, problem.tensors), (problem.with_gradients, problem.gradients)):
        for name, value in values.items():
            expected = solve(change(**{name: torch.zeros(value.shape)}), "cpu")
            assert_same_bits(solve(change(**{name: torch._efficientzerotensor(value.shape)}), "cpu"), expected)

for dtype in (torch.float32, torch.bfloat16):
    try:
        memory = torch.empty(2**31 + 2**20, dtype=dtype)
    except RuntimeError as error:
        sys.exit(f"no memory: {error}")
    for build in (pool_problem, modulate_problem):
        problem = away_from_kink(build(random_map(2, 3, 3, 2), LatentLayout((2, 1)), channels=16, dtype=dtype))
        expected = expect(problem)
        for dimension in range(4):
            def far(tensor, place):
                strides = list(tensor.stride())
                strides[dimension] = (2**31 + 2**16) // (tensor.shape[dimension] - 1)
                return memory.as_strided(tensor.shape, strides, place * 2**14).copy_(tensor)

            these = problem.with_tensors(x=far(problem.tensors["x"], 0))
            if build is modulate_problem:
                these = these.with_gradients(out=far(problem.gradients["out"], 1))
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
