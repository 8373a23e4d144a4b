"""The kernels in CUDA C++ run by the host: csrc/cuda/execution.h says how, and what that finds.

The library is built beside the objects of an in-place build; SCA_CUDA_EMULATION_PATH names another one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sca_kernels import cuda
from sca_kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]

# Threads of a block; whether they and the blocks take turns from the last one to the first; how many blocks a cluster
# can have; how many bytes of shared memory a kernel can ask for. One thread takes what needs neither, three take
# clusters of little memory and much memory without clusters, 256 what the newest GPUs have.
ORDERS = {
    "one thread": (1, False, 1, 0),
    "three threads": (3, False, 8, 2 << 10),
    "three threads, backwards": (3, True, 1, 88 << 10),
    "256 threads": (256, False, 8, 88 << 10),
    "256 threads, backwards": (256, True, 8, 88 << 10),
}


@functools.cache
def library() -> Any:
    """The module, or None where it was not built."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}" / "cuda_emulation"
    path = os.environ.get("SCA_CUDA_EMULATION_PATH") or str(folder / f"_cuda_emulation{suffix}")
    if not Path(path).exists():
        return None
    specification = importlib.util.spec_from_file_location("_cuda_emulation", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the backend "cuda" runs on the CPU."""

    def run(kernel: str, tensor: Tensor, *arguments: Any) -> None:
        getattr(library(), kernel)(*arguments)

    monkeypatch.setattr(cuda, "settings", lambda tensor: (90, 2, 0))
    monkeypatch.setattr(cuda, "run", run)
    emulated = dataclasses.replace(BACKENDS["cuda"], devices=frozenset({"cpu"}), why_not=lambda: None)
    monkeypatch.setitem(BACKENDS, "cuda", emulated)


def emulate(order: str) -> None:
    """Has blocks of so many threads run in an order, a key of ORDERS."""
    library().emulate(*ORDERS[order])
