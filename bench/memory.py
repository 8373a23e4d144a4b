"""Peak memory of a computation, counted and not estimated.

PyTorch's profiler reports every allocation and release of tensor memory, to the byte, at the
allocator itself. That sees what a ``TorchDispatchMode`` does not, the workspaces that an operator
makes while it runs, and it is free of what blurs the resident size of a process: pages that the C
library keeps, libraries being loaded, other threads. It does not see memory that a library takes
behind PyTorch's back; the kernels of this one take none, so if anything the others are flattered.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import Contender, Figure


def peak_bytes(run: Callable[[], object]) -> int:
    """The most tensor memory that ``run`` and its result hold at a time, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if _is_memory(event)]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def peak_of(contender: Contender) -> Figure:
    """:func:`peak_bytes` of a contender, in MiB."""
    mebibytes = peak_bytes(contender.run) / 2**20
    return Figure(
        contender.name, contender.shape, median=mebibytes, lower=mebibytes, upper=mebibytes, rounds=(mebibytes,)
    )


def counts_correctly() -> bool:
    """Whether the profiler of this PyTorch reports what a known sequence of allocations holds."""
    mebibyte = 1 << 20

    def hold_five() -> torch.Tensor:
        first = torch.empty(mebibyte, dtype=torch.uint8)
        second = torch.empty(2 * mebibyte, dtype=torch.uint8)
        del first
        third = torch.empty(3 * mebibyte, dtype=torch.uint8)
        del second
        return third

    return peak_bytes(hold_five) == 5 * mebibyte


def _is_memory(event: dict[str, object]) -> bool:
    return event.get("name") == "[memory]"
