"""Calls like those that were checked before: what checks would find again, and need not look for.

Checks and preparations of a tiny call take longer than its kernel. Their outcome depends on the types, shapes, strides
and devices of tensors and on settings, never on addresses or on what is in a tensor. That is a call's signature, which
the compiled library reads and looks up in less time than one check takes. Whatever is not in the signature as it was
before, is checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, cpu
from ..labels import LabelMap, LatentLayout, LatentSelection
from ..tracing import PLAIN_CLASSES, something_listens
from .arguments import Grouping, grouping

_MOST_CALLS = 1024  # of an operator that are remembered
_CPU = torch.device("cpu")
_TOKENS = (LabelMap, LatentLayout, LatentSelection)


# A call as the user makes it: tensors in the operator's order, before any preparation, and what else checks look at.
Given = tuple[tuple[Any, ...], tuple[Any, ...]]


class KnownCall(NamedTuple):
    """What is known of a call from its signature.

    Attributes:
        settings: the arguments of the operator between its tensors and the backend.
        inputs: the positions of tensors that require gradients, if those are recorded.
    """

    settings: tuple[Any, ...]
    inputs: tuple[int, ...]


class KnownCalls:
    """The calls of an operator that were checked, for the compiled kernels for CPUs."""

    def __init__(self) -> None:
        self._calls = _two_tables()

    def find(self, tensors: tuple[Any, ...], others: tuple[Any, ...]) -> KnownCall | None:
        """What is known of a call that those kernels serve."""
        if self._calls is None:
            return None
        known: KnownCall | None = self._calls[torch.is_grad_enabled()].find(tensors, others)
        return known

    def add(self, given: Given, prepared: tuple[Tensor | None, ...], settings: tuple[Any, ...]) -> None:
        """Remembers a call that was checked, with the tensors and settings that the checks made of it.

        The next one skips the checks and goes to the compiled kernels with what is given. They can broadcast by
        themselves, and that is all that may have been done to the tensors.
        """
        tensors, others = given
        *settings_between, backend = settings
        if (
            self._calls is None
            or backend != "cpu"
            or not all(map(_shares_memory, tensors, prepared))
            or not all(isinstance(setting, int | float | str) for setting in settings)
        ):
            return
        gradients = torch.is_grad_enabled()
        inputs = (
            index for index, tensor in enumerate(tensors) if gradients and tensor is not None and tensor.requires_grad
        )
        self._calls[gradients].add(tensors, others, KnownCall(tuple(settings_between), tuple(inputs)))


def can_be_known(operator: str, features: Any, *tokens: Any) -> bool:
    """Whether the compiled kernels for CPUs serve a call, and its checks are neither watched nor part of a graph.

    Args:
        operator: its name.
        features: what should be the tensor by which the backend is chosen.
        tokens: what should be label maps, layouts and selections.
    """
    if torch.compiler.is_compiling() or something_listens() or forward_ad._current_level >= 0:
        return False
    for side in tokens:
        if not isinstance(side, _TOKENS):
            return False
    return isinstance(features, Tensor) and backends.serves("cpu", operator, features.device, features.dtype)


def look_at(tokens: LabelMap | LatentLayout | LatentSelection) -> tuple[Grouping, tuple[Any, ...]]:
    """How tokens are grouped, and what checks see of them beside that."""
    if isinstance(tokens, LabelMap):
        return grouping(tokens, _CPU), (LabelMap, tokens.num_labels, tokens.labels)
    if isinstance(tokens, LatentLayout):
        return grouping(tokens, _CPU), (LatentLayout, tokens.count)
    # As it is: one on another device stays unknown.
    return (tokens.cu_latents, None, tokens.max_per_label), (LatentSelection, tokens.num_labels, tokens.index)


def _two_tables() -> tuple[Any, Any] | None:
    """What is known of calls while no gradients are recorded, and while they are: checks look at that too."""
    if cpu.native is None:
        return None
    without, with_gradients = (cpu.native.KnownCalls(PLAIN_CLASSES, _MOST_CALLS) for _ in range(2))
    return without, with_gradients


def _shares_memory(given: Any, prepared: Tensor | None) -> bool:
    if given is None or prepared is None:
        return given is prepared
    return isinstance(given, Tensor) and given.dtype == prepared.dtype and given.data_ptr() == prepared.data_ptr()
