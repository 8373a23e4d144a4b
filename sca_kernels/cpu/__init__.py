"""The compiled C++ kernels. Loading never fails: without the library, :func:`why_not` says what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CAPABILITIES = ("baseline", "avx2", "avx512")  # instruction sets, weakest first, numbered as in csrc/sca_kernels.h

# From this size on the C library gives every tensor fresh memory and returns it to the system afterwards.
_FRESH_BYTES = 32 << 20

# Below this many multiply-adds a second thread costs more than it saves.
_WORK_PER_THREAD = 1 << 17


def _load() -> tuple[ModuleType | None, str | None]:
    path = os.environ.get("SCA_NATIVE_PATH")  # a library to load in place of the installed one
    try:
        if not path:
            return importlib.import_module("sca_kernels._native"), None
        spec = importlib.util.spec_from_file_location("sca_kernels._native", path)
        if spec is None or spec.loader is None:
            return None, f"SCA_NATIVE_PATH={path} is not an extension module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, None
    except ModuleNotFoundError:
        return None, (
            "the compiled library is not part of this installation (it is built on Linux, where g++ is found)"
        )
    except Exception as error:  # whatever is wrong with the file, importing the package must not fail
        return None, f"the compiled library cannot be loaded: {error}"


def _choose_capability() -> tuple[int, str | None]:
    if native is None:
        return 0, _load_error
    best = native.best_cpu_capability()
    wanted = os.environ.get("SCA_CPU_CAPABILITY")
    if not wanted:
        return best, None
    if wanted not in CAPABILITIES:
        return best, f"SCA_CPU_CAPABILITY: expected one of {', '.join(CAPABILITIES)}, got {wanted!r}"
    capability = CAPABILITIES.index(wanted)
    if not native.has_cpu_capability(capability):
        return best, f"SCA_CPU_CAPABILITY={wanted}: this machine or this build has no kernels for it"
    return capability, None


native: Any
native, _load_error = _load()
_capability, _capability_error = _choose_capability()


def why_not() -> str | None:
    """The reason why the kernels cannot run, or None if they can."""
    return _load_error or _capability_error


def capability() -> int:
    """The instruction set in use, an index into CAPABILITIES."""
    return _capability


def capabilities() -> list[str]:
    """The instruction sets that both this machine and this build have."""
    if native is None:
        return []
    return [name for index, name in enumerate(CAPABILITIES) if native.has_cpu_capability(index)]


def set_capability(name: str) -> None:
    """Uses an instruction set from now on, for tests and comparisons; one of :func:`capabilities`."""
    global _capability
    if name not in capabilities():
        raise ValueError(f"name: expected one of {', '.join(capabilities())}, got {name!r}")
    _capability = CAPABILITIES.index(name)


def settings(tensor: Tensor) -> tuple[int, int, int]:
    """The instruction set, PyTorch's number of threads, and how many multiply-adds each of them is worth."""
    return _capability, torch.get_num_threads(), _WORK_PER_THREAD


def run(kernel: str, tensor: Tensor, *arguments: Any) -> None:
    """Runs a kernel."""
    getattr(native, kernel)(*arguments)


def prepare_result(tensor: Tensor) -> Tensor:
    """Prepares the memory of a large result to be written for the first time; returns the tensor."""
    if tensor.nbytes >= _FRESH_BYTES:
        native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
