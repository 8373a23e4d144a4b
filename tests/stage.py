"""Where the tests of test_gpu.py take place: on a GPU, or without one as a rehearsal, in small and on the CPU.

A rehearsal shows that the tests themselves are right. What only a GPU can show it leaves out: nothing waits, and a
graph that is replayed is the call itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sca_kernels import triton

ON_A_GPU = torch.cuda.is_available() and not triton.INTERPRETED
DEVICE = "cuda" if ON_A_GPU else "cpu"


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, it is an error if PyTorch waits for the GPU."""
    if not ON_A_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(run: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """Captures a call in a graph: its results, and a function that computes them anew, in place."""
    if not ON_A_GPU:
        results = run()

        def run_again() -> None:
            for result, new in zip(results, run(), strict=True):
                result.copy_(new)

        return results, run_again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


def free_bytes() -> int:
    """Of the GPU's memory."""
    return torch.cuda.mem_get_info()[0] if ON_A_GPU else 0


def findings(output: str) -> int | None:
    """How many errors compute-sanitizer reports; None if it does not say."""
    summary = re.search(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    return None if summary is None else int(summary[1])
