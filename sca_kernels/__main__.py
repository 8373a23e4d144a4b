"""``python -m sca_kernels``: what a bug report needs."""

from __future__ import annotations

import platform

import torch

from . import __version__, cpu
from .backends import BACKENDS


def report() -> str:
    """Versions, the CPU's instruction sets, and each backend with whether it can run."""
    built = cpu.capabilities()
    lines = [
        f"sca-kernels {__version__}",
        f"torch       {torch.__version__}, {torch.get_num_threads()} threads",
        f"python      {platform.python_version()}, {platform.platform()}",
        f"cpu         {', '.join(built) if built else 'no compiled kernels'}"
        + ("" if cpu.why_not() else f"; in use: {cpu.CAPABILITIES[cpu.capability()]}"),
        "backends",
    ]
    for name, backend in BACKENDS.items():
        reason = backend.why_not()
        state = "available" if reason is None else f"not available: {reason}"
        lines.append(f"  {name:<10} {state} ({backend.summary})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
