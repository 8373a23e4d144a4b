"""Every kernel in Triton, in every configuration that is shipped, compiled for GPUs that are not there."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from bench.gpu import calls

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from bench.gpu.compiling import TARGETS, begin_to_compile
from bench.gpu.launches import Launch, launches_of
from sca_kernels import triton

pytestmark = [
    pytest.mark.compiles_gpu,
    pytest.mark.skipif(triton.INTERPRETED, reason="with TRITON_INTERPRET=1 nothing is compiled"),
]

CALLS = {str(call): call for call in calls.all_calls()}


@functools.cache
def launches(call: str) -> list[Launch]:
    found = launches_of(CALLS[call].prepare)
    assert found, "the call launches no kernel"
    return found


def cases() -> list[tuple[str, str]]:
    """Float16 has no configurations of its own, so one target will do."""
    return [
        (name, target)
        for name, call in CALLS.items()
        for target in TARGETS
        if call.dtype != torch.float16 or target == "sm_90"
    ]


@pytest.fixture(scope="module", autouse=True)
def begin_with_all(request: pytest.FixtureRequest) -> None:
    """While a test looks at one kernel, the next ones are compiled already."""
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function):
            for launch in launches(item.callspec.params["call"]):
                begin_to_compile(launch, TARGETS[item.callspec.params["target"]])


@pytest.mark.parametrize(("call", "target"), cases())
def test_compiles_and_fits(call: str, target: str) -> None:
    for compiled in dict.fromkeys(begin_to_compile(launch, TARGETS[target]).result() for launch in launches(call)):
        assert compiled.spills == 0, compiled
        assert compiled.shared_memory <= TARGETS[target].shared_memory, compiled
        assert compiled.tensor_cores > 0 or not compiled.has_products, compiled
