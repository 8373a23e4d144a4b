"""Kernels in Triton, for GPUs. Never run on a GPU yet; see docs/gpu-validation.md.

Importing this needs no Triton and no GPU: :func:`why_not` says what is missing. With ``TRITON_INTERPRET=1`` in the
environment Triton's interpreter runs the kernels on tensors of the CPU, slowly, to test them.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = frozenset({"cpu"} if INTERPRETED else {"cuda"})
_OLDEST = (3, 6)
_LEAST_CAPABILITY = (8, 0)  # of NVIDIA's GPUs: what Triton supports, and the least that is compiled for


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'sca-kernels[triton]')"
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"it needs Triton {'.'.join(map(str, _OLDEST))} or later, and {found} is installed"
    return None


_reason = _missing()


def why_not() -> str | None:
    """The reason why the kernels cannot run, or None if they can."""
    if _reason is not None or INTERPRETED:
        return _reason
    if not torch.cuda.is_available():
        return "there is no GPU (with TRITON_INTERPRET=1 the kernels run on the CPU, slowly, to test them)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (_LEAST_CAPABILITY, capability))
        return f"it needs a GPU of compute capability {needed} or more, and this one has {found}"
    return None
