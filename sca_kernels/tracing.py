"""Whether calls are being recorded rather than run, so that nothing they make may be remembered."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Whether operations now go to a compiler, an export or a dispatch mode such as ``FakeTensorMode``."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_recording(tensor: Tensor) -> bool:
    """Whether what is computed from ``tensor`` now belongs to a graph and must not be remembered outside of it.

    True while compiling or exporting, for the stand-ins that tracing uses in place of tensors, and while a CUDA graph
    is captured.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_plain_call(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher would bring an operator's call to its kernel and do nothing else on the way.

    It has more to do for what listens to operators, a tensor subclass, a lazily negated tensor or zeros without memory.
    Otherwise it can be left out: it costs as much as a small call.
    """
    if something_listens():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN_CLASSES or tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return True


def something_listens() -> bool:
    """Whether there is a mode, a transform, a trace or a profiler that must learn of each operator."""
    return (
        torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


PLAIN_CLASSES = (Tensor, torch.nn.Parameter)
