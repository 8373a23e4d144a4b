"""Calls of kernels through the C interface of csrc/sca_kernels.h, which libraries for several devices have.

The functions here take the arguments of an operator as its schema has them, without the backend, and pass them on as
one tuple: the compiled module reads types, sizes and strides from the tensors themselves, and copies or broadcasts
where a kernel needs it. What is left to do here is to find memory for the results.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Library(Protocol):
    """The kernels for one kind of device. The modules ``sca_kernels.cpu`` and ``sca_kernels.cuda`` are libraries."""

    def settings(self, tensor: Tensor) -> tuple[int, int, int]:
        """Which kernels serve a call with this tensor, how many threads or multiprocessors there are, and how many
        multiply-adds a call must have for each of them, to be given more than one."""

    def prepare_result(self, tensor: Tensor) -> Tensor:
        """Prepares the memory of a result to be written for the first time; returns the tensor."""

    def run(self, kernel: str, tensor: Tensor, *arguments: Any) -> None:
        """Runs a kernel where the tensor is: a function of the compiled module by its name, with its arguments."""
