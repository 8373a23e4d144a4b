"""Where the time of encoder and generator goes: ``python -m bench.whole_model_profile`` prints the tables of
``docs/profile.md``.

PyTorch's profiler counts for every operator the time that no other operator inside it takes. What is left of the time
of a run is Python, PyTorch on the way to its operators, and the profiler's own work, which the time of a run without it
tells apart.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from . import label_maps
from .bench_scam_models import MEMORY_ORDER
from .timing import Contender
from .whole_models import CONFIGURATIONS, PASSES, Problem

RUNS = 5
# The first that occurs in an operator's name.
PARTS = {
    "conv": "convolutions",
    "semantic_modulate": "semantic_modulate",
    "semantic_pool": "semantic_pool",
    "semantic_cross_attention": "semantic_cross_attention",
    "label_plan": "label plans",
    "mm": "matrix products of the latents",
    "upsample": "nearest upsampling",
    "layer_norm": "layer norms",
}
OTHER = "other operators"
OUTSIDE = "Python, the way to the operators, the profiler"


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a run without the profiler, with it, and of each part of the latter."""

    unprofiled: float
    total: float
    parts: dict[str, float]


def break_down(contender: Contender) -> Breakdown:
    """The mean over some runs."""
    _time_runs(contender)
    unprofiled = _time_runs(contender)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        total = _time_runs(contender)
    parts: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = next((part for sign, part in PARTS.items() if sign in event.key), OTHER)
        parts[name] += event.self_cpu_time_total / 1e3 / RUNS
    parts[OUTSIDE] = total - sum(parts.values())
    return Breakdown(unprofiled, total, dict(parts))


def _time_runs(contender: Contender) -> float:
    """Milliseconds of a run."""
    start = time.perf_counter()
    for _ in range(RUNS):
        contender.run()
    return (time.perf_counter() - start) * 1e3 / RUNS


def main() -> None:
    """Prints a table for inference and one for a training step."""
    problems = {name: Problem(CONFIGURATIONS[name], label_maps.parts) for name in ("CelebAMask-HQ", "ADE20K")}
    for backward, title in PASSES.items():
        settings = {"backward": backward, "memory_format": MEMORY_ORDER[backward]}
        columns = {name: break_down(problem.ours(name, **settings)) for name, problem in problems.items()}
        print(f"\n| {title}, {torch.get_num_threads()} threads | " + " | ".join(columns) + " |")
        print("|---|" + "---:|" * len(columns))
        print(
            "| without the profiler, ms | "
            + " | ".join(f"{column.unprofiled:.0f}" for column in columns.values())
            + " |"
        )
        print("| with it, ms | " + " | ".join(f"{column.total:.0f}" for column in columns.values()) + " |")
        for part in (*PARTS.values(), OTHER, OUTSIDE):
            shares = (f"{column.parts.get(part, 0.0) / column.total:.1%}" for column in columns.values())
            print(f"| {part} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()
