"""What the kernels must move: the bytes of every tensor that a call's kernels are given, counted once for each kernel.

    python -m bench.gpu.traffic --bandwidth 3350

A model, not a measurement: it takes each kernel's tensors to be read or written whole and once, and what several
programs read to be read from memory once. What PyTorch's own kernels move for us is not counted: plans, the mean of all
values. Next to the bytes stands the time that they take at a stated bandwidth, in GB/s.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable

import torch

from .calls import Call, Results, all_calls
from .launches import Launch, launches_of


def bytes_of(launch: Launch) -> int:
    """Bytes of the tensors of a kernel; of an expanded one, those that are there."""
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    return sum(
        math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        * tensor.element_size()
        for tensor in tensors
    )


def bytes_of_call(prepare: Callable[[], Callable[[], Results]], *, backward: bool = True) -> dict[str, int]:
    """By kernel, in the order of the first launches of each; ``prepare`` returns the call."""
    found: dict[str, int] = {}
    for launch in launches_of(prepare, backward=backward):
        found[launch.name] = found.get(launch.name, 0) + bytes_of(launch)
    return found


def table(calls: Iterable[Call], bandwidth: float) -> str:
    lines = [
        f"| call | kernel | MB | microseconds at {bandwidth:g} GB/s |",
        "|---|---|---:|---:|",
    ]
    for call in calls:
        for kernel, size in bytes_of_call(call.prepare).items():
            lines.append(f"| {call} | {kernel.strip('_')} | {size / 1e6:.1f} | {size / bandwidth / 1e3:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="of the memory, in GB/s; default: an H100's")
    print(table((call for call in all_calls() if call.headline), parser.parse_args().bandwidth))
