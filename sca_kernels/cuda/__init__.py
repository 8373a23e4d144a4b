"""The compiled CUDA C++ kernels for NVIDIA GPUs. Never run on a GPU yet; see docs/gpu-validation.md.

Importing this needs no GPU and no driver: the library is loaded by the first call, and :func:`why_not` says what is
missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def why_not() -> str | None:
    """The reason why the kernels cannot run, or None if they can."""
    if importlib.util.find_spec("sca_kernels._cuda") is None:
        return "the library for GPUs is not part of this installation (it is built where nvcc is found)"
    return None if torch.cuda.is_available() else "there is no GPU"


@functools.cache
def kernels() -> Any:
    """The compiled module."""
    return importlib.import_module("sca_kernels._cuda")


def settings(tensor: Tensor) -> tuple[int, int, int]:
    """The device's compute capability, such as 90 for 9.0, and the number of its multiprocessors, whatever the work."""
    return *_properties(tensor.device), 0


def prepare_result(tensor: Tensor) -> Tensor:
    """Memory of a GPU needs no preparation."""
    return tensor


def run(kernel: str, tensor: Tensor, *arguments: Any) -> None:
    """Enqueues a kernel on the current stream of a tensor's device."""
    function, device = getattr(kernels(), kernel), tensor.device
    if device.index == torch.cuda.current_device():
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)
        return
    with torch.cuda.device(device):
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
