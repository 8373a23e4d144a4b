"""Whether calls are being recorded rather than run, so that nothing they make may be remembered."""

from __future__ import annotations

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
