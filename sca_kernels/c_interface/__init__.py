"""Calls of kernels through the C interface of csrc/sca_kernels.h, which libraries for several devices have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_SCALAR_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Library(Protocol):
    """The kernels for one kind of device. The modules ``sca_kernels.cpu`` and ``sca_kernels.cuda`` are libraries."""

    def kernels(self) -> Any:
        """The compiled module."""

    def settings(self, device: torch.device, work: int) -> tuple[int, int]:
        """Which kernels serve a call, and on how many threads or multiprocessors, if it has so many multiply-adds."""

    def prepare_result(self, tensor: Tensor) -> Tensor:
        """Prepares the memory of a result to be written for the first time; returns the tensor."""

    def run(self, method: Callable[..., None], device: torch.device, *arguments: Any) -> None:
        """Runs a kernel: a method of a call, with its arguments."""


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def scalar_type(dtype: torch.dtype) -> int:
    """The number of a type in the C interface."""
    return _SCALAR_TYPES[dtype]
