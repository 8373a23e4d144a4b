"""Which backends exist, which one serves a call, and how to force one.

A backend is a set of implementations of the operators. ``reference`` is plain PyTorch and runs everywhere; ``cpu`` is
the compiled C++ library; ``triton`` and ``cuda`` are kernels for GPUs. The default for a call is looked up by operator
and device; ``with backend("reference"):`` or the environment variable ``SCA_BACKEND`` force one, and a forced backend
that cannot serve a call is an error.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import triton

_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Backend:
    """A backend.

    Attributes:
        name: what users call it.
        summary: one line on what it is.
        devices: the device types it runs on; empty means all.
        operators: the operators it has, or None for all.
        why_not: the reason why it cannot run in this process, or None if it can.
        dtypes: the floating-point types it computes in.
    """

    name: str
    summary: str
    devices: frozenset[str]
    operators: frozenset[str] | None
    why_not: Callable[[], str | None]
    dtypes: frozenset[torch.dtype] = _FLOATS

    def why_not_for(self, operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why it cannot serve a call, or None if it can."""
        reason = self.why_not()
        if reason is not None:
            return reason
        if self.operators is not None and operator not in self.operators:
            return f"it has no {operator}"
        if self.devices and device.type not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {device.type}"
        if dtype.is_floating_point and dtype not in self.dtypes:
            return f"it does not compute in {dtype}"
        return None


def _native_why_not() -> str | None:
    from . import cpu

    return cpu.why_not()


def _cuda_why_not() -> str | None:
    from . import cuda

    return cuda.why_not()


BACKENDS = {
    "reference": Backend(
        name="reference",
        summary="plain PyTorch, dense: the meaning of each operator; twice differentiable",
        devices=frozenset(),
        operators=None,
        why_not=lambda: None,
    ),
    "cpu": Backend(
        name="cpu",
        summary="compiled C++ kernels",
        devices=frozenset({"cpu"}),
        operators=frozenset(
            {"label_plan", "semantic_cross_attention", "semantic_pool", "semantic_modulate", "instance_modulate"}
        ),
        why_not=_native_why_not,
    ),
    "triton": Backend(
        name="triton",
        summary="kernels in Triton for GPUs; never run on a GPU yet",
        devices=triton.DEVICES,
        operators=frozenset(
            {"label_plan", "semantic_cross_attention", "semantic_pool", "semantic_modulate", "instance_modulate"}
        ),
        why_not=triton.why_not,
        dtypes=_FLOATS - {torch.float64},
    ),
    "cuda": Backend(
        name="cuda",
        summary="compiled CUDA C++ kernels for NVIDIA GPUs; never run on a GPU yet",
        devices=frozenset({"cuda"}),
        operators=frozenset({"semantic_cross_attention", "semantic_pool", "semantic_modulate", "instance_modulate"}),
        why_not=_cuda_why_not,
        dtypes=_FLOATS - {torch.float64},
    ),
}

# The default for an operator on a type of device: the first that can serve the call. Everything else gets "reference".
# Nothing of "triton" and "cuda" has run on a GPU yet, so they are no default for anything until they have.
_PREFERENCES: dict[tuple[str, str], tuple[str, ...]] = {
    ("label_plan", "cpu"): ("cpu",),
    ("semantic_cross_attention", "cpu"): ("cpu",),
    ("semantic_pool", "cpu"): ("cpu",),
    ("semantic_modulate", "cpu"): ("cpu",),
    ("instance_modulate", "cpu"): ("cpu",),
}

_ENVIRONMENT_CHOICE = os.environ.get("SCA_BACKEND", "")


class _Forced(threading.local):  # torch.compile can follow this, but not a ContextVar
    name: str = _ENVIRONMENT_CHOICE


_forced = _Forced()
_defaults: dict[tuple[str, torch.device, torch.dtype], str] = {}
_implementations: dict[tuple[str, str], Callable[..., Any]] = {}


class backend:
    """Forces a backend for the calls of this thread inside a ``with`` block.

    A backward pass uses the backend of its forward pass, wherever it runs. The environment variable ``SCA_BACKEND``
    does the same for a whole process; the innermost ``with`` wins.

    Raises:
        ValueError: if there is no backend of that name.

    Example:
        >>> with backend("reference"):
        ...     pass
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "backend")
        self.name = name
        self.before: list[str] = []

    def __enter__(self) -> None:
        self.before.append(_forced.name)
        _forced.name = self.name

    def __exit__(self, *exception: object) -> None:
        _forced.name = self.before.pop()


def resolve(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves a call.

    Raises:
        RuntimeError: if the backend that is forced cannot, with the reason.
    """
    forced = _forced.name
    if not forced:
        return default(operator, device, dtype)
    _check_name(forced, "SCA_BACKEND")
    reason = BACKENDS[forced].why_not_for(operator, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {forced!r} cannot serve {operator} on {device} in {dtype}: {reason}")
    return forced


def serves(name: str, operator: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend is the one that serves a call."""
    forced = _forced.name
    if not forced:
        return default(operator, device, dtype) == name
    return forced == name and BACKENDS[name].why_not_for(operator, device, dtype) is None


def implementation(operator: str, name: str) -> Callable[..., Any]:
    """The function that implements an operator in a backend: ``sca_kernels.<backend>.<operator>.<operator>``."""
    key = (operator, name)
    function = _implementations.get(key)
    if function is None:
        base = operator.removesuffix("_backward")
        module = importlib.import_module(f"sca_kernels.{name}.{base}")
        function = _implementations[key] = getattr(module, operator)
    return function


def default(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves a call when none is forced."""
    key = (operator, device, dtype)
    name = _defaults.get(key)
    if name is None:
        able = (
            candidate
            for candidate in _PREFERENCES.get((operator, device.type), ())
            if BACKENDS[candidate].why_not_for(operator, device, dtype) is None
        )
        name = next(able, "reference")
        if not torch.compiler.is_compiling():
            _defaults[key] = name
    return name


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
