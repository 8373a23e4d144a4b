"""Every kernel in Triton, in every configuration that is shipped, compiled for GPUs that are not there."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os

import pytest
import torch

from bench.gpu import calls

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from bench.gpu.compiling import TARGETS, compile_what_differs
from bench.gpu.launches import Launch, launches_of
from sca_kernels import triton
from sca_kernels.triton import launch

pytestmark = [
    pytest.mark.compiles_gpu,
    pytest.mark.skipif(triton.INTERPRETED, reason="with TRITON_INTERPRET=1 nothing is compiled"),
]

# Half the published sides, which is enough for the same configurations.
CALLS = {str(call): call for call in calls.all_calls(shrink=2)}


@functools.cache
def launches(call: str) -> list[Launch]:
    found = launches_of(CALLS[call].prepare)
    assert found, "the call launches no kernel"
    return found


def cases() -> list[tuple[str, str]]:
    """Float16 has no configurations of its own, so one target will do."""
    return [
        (name, target)
        for target in os.environ.get("SCA_COMPILE_TARGETS", "").split() or TARGETS
        for name, call in CALLS.items()
        if call.dtype != torch.float16 or target == "sm_90"
    ]


@pytest.mark.parametrize(("call", "target"), cases())
def test_compiles_and_fits(call: str, target: str) -> None:
    for compiled in compile_what_differs(launches(call), TARGETS[target]):
        assert compiled.spills == 0, compiled
        assert compiled.shared_memory <= TARGETS[target].shared_memory, compiled
        assert compiled.tensor_cores > 0 or not compiled.has_products, compiled


def test_calls_use_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        (kernel, of_type, of_size)
        for kernel, types in launch.table()[launch.DEFAULT].items()
        for of_type, sizes in types.items()
        for of_size in sizes
    }
    used = set()
    lookup = launch._lookup

    def note(kernel: str, size_class: str, device: str, dtype: str) -> launch.Configuration:
        names = itertools.product([kernel], (dtype, launch.ANY), (size_class, launch.ANY))
        used.add(next(name for name in names if name in table))
        return lookup(kernel, size_class, device, dtype)

    monkeypatch.setattr(launch, "_lookup", note)
    for call in CALLS.values():
        launches_of(call.prepare)
    assert used == table
