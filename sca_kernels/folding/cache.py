"""Products of weights alone, remembered while the weights stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..tracing import is_tracing
from .layers import Projection

_Made = TypeVar("_Made")


class FoldingCache:
    """Remembers products of weights alone, for inference.

    A product is used again while its parameters are the same objects in the same memory, type and version, and none
    takes a gradient. It is neither made nor used while compiling, exporting or capturing a CUDA graph. Copies and
    pickles of a cache are empty.

    Writing to ``parameter.data`` escapes PyTorch's version counters. On the CPU a few elements are compared as well,
    which notices it where all elements change, as in a moving average; elsewhere call :meth:`clear`.

    Example:
        >>> cache = FoldingCache()
        >>> len(cache)
        0
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[list[_Fingerprint], Any]] = {}

    def clear(self) -> None:
        """Forgets all products."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldingCache:
        return FoldingCache()

    def __reduce__(self) -> tuple[type[FoldingCache], tuple[()]]:
        return FoldingCache, ()

    def serves(self, layers: Sequence[Projection]) -> bool:
        """Whether products of these layers are remembered."""
        if torch.compiler.is_compiling() or is_tracing():
            return False
        may_record = torch.is_grad_enabled()
        for layer in layers:
            for tensor in layer.tensors:
                if (
                    type(tensor) is not nn.Parameter
                    or (may_record and tensor.requires_grad)
                    or tensor.is_inference()
                    or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
                ):
                    return False
        return True

    def product(self, name: str, layers: Sequence[Projection], dtype: torch.dtype, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns, made only once for the same parameters."""
        tensors = [tensor for layer in layers for tensor in layer.tensors]
        scales = tuple(scale for layer in layers for scale in (layer.weight_scale, layer.bias_scale))
        key = (name, dtype, scales, tuple(map(id, tensors)))
        entry = self._entries.get(key)
        if entry is not None:
            fingerprints, made = entry
            if all(known.fits(tensor) for known, tensor in zip(fingerprints, tensors, strict=True)):
                return made
        with torch.inference_mode(False), torch.no_grad():  # what is remembered may serve training later
            made = pytree.tree_map_only(Tensor, Tensor.contiguous, make())
        alive = {key: entry for key, entry in self._entries.items() if all(known.is_alive for known in entry[0])}
        alive[key] = ([_Fingerprint(tensor) for tensor in tensors], made)
        self._entries = alive
        return made


class _Fingerprint:
    """What a parameter was like when a product was made of it."""

    _PROBES = 16

    def __init__(self, tensor: Tensor) -> None:
        self.parameter = weakref.ref(tensor)
        self.state = self._state(tensor)
        self.probe: Tensor | None = None
        self.seen: Tensor | None = None
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            flat = tensor.detach().view(-1)
            self.probe = flat[:: max(1, flat.numel() // self._PROBES)]
            self.seen = self.probe.clone()

    @staticmethod
    def _state(tensor: Tensor) -> tuple[Any, ...]:
        return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape

    @property
    def is_alive(self) -> bool:
        return self.parameter() is not None

    def fits(self, tensor: Tensor) -> bool:
        """Whether it is still the same parameter, unchanged."""
        return (
            self.parameter() is tensor
            and self.state == self._state(tensor)
            and (self.probe is None or self.seen is None or torch.equal(self.probe, self.seen))
        )
