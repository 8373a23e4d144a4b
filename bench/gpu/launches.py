"""Which kernels the public operators launch for calls of the published shapes, found out without a GPU.

The operators run on tensors of the CPU, or of a GPU, and what would be launched is written down instead. Nothing is
computed: results are uninitialised memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import sca_kernels
from sca_kernels import backends
from sca_kernels.triton import launch

from .calls import Results, step_of


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it was given.

    Attributes:
        kernel: the function decorated with ``triton.jit``.
        grid: number of programs along each axis.
        arguments: by name: tensors (of PyTorch's device "meta", which hold no memory), numbers, None, and the values of
            constants.
        constants: the names of those that are constants in compiled code.
        options: ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: frozenset[str]
    options: Mapping[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def _without_memory(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, the backend "triton" serves calls anywhere, and its launches are appended to the list."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        named = dict(zip(kernel.arg_names, map(_without_memory, arguments), strict=False))
        constants = {name: value for name, value in options.items() if name in kernel.arg_names}
        rest = {name: value for name, value in options.items() if name not in constants}
        launches.append(Launch(kernel, grid, {**named, **constants}, frozenset(constants), rest))

    run, backend = launch._run, backends.BACKENDS["triton"]
    launch._run = record
    backends.BACKENDS["triton"] = dataclasses.replace(backend, devices=frozenset(), why_not=lambda: None)
    try:
        yield launches
    finally:
        launch._run = run
        backends.BACKENDS["triton"] = backend


def launches_of(prepare: Callable[[], Callable[[], Results]], *, backward: bool = True) -> list[Launch]:
    """What a call launches, forward and then backward from all of its results that have gradients.

    Args:
        prepare: returns the call; what that launches is not counted.
    """
    run = prepare()
    with recording() as found, sca_kernels.backend("triton"), torch.set_grad_enabled(backward):
        step_of(run)()
    return found
