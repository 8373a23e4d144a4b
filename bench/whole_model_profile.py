"""Where the time of encoder and generator goes: ``python -m bench.whole_model_profile`` prints the tables of
``docs/profile.md``.

PyTorch's profiler counts for every operator the time that no other operator inside it takes. What is left of the time
of a run is Python, and PyTorch on the way to its operators. The profiler's own work makes a run a few percent slower.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from . import label_maps
from .bench_scam_models import CONFIGURATIONS, MEMORY_ORDER, PASSES
from .timing import Contender
from .whole_models import Problem

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
OUTSIDE = "Python and the way to the operators"


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a run, and of each part of it."""

    total: float
    parts: dict[str, float]


def break_down(contender: Contender) -> Breakdown:
    """The mean over some runs."""
    for _ in range(2):
        contender.run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(RUNS):
            contender.run()
        total = (time.perf_counter() - start) * 1e3 / RUNS
    parts: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = next((part for sign, part in PARTS.items() if sign in event.key), OTHER)
        parts[name] += event.self_cpu_time_total / 1e3 / RUNS
    parts[OUTSIDE] = total - sum(parts.values())
    return Breakdown(total, dict(parts))


def main() -> None:
    """Prints a table for inference and one for a training step."""
    problems = {name: Problem(CONFIGURATIONS[name], label_maps.parts) for name in ("CelebAMask-HQ", "ADE20K")}
    for backward, title in PASSES.items():
        settings = {"backward": backward, "memory_format": MEMORY_ORDER[backward]}
        columns = {name: break_down(problem.ours(name, **settings)) for name, problem in problems.items()}
        print(f"\n| {title}, {torch.get_num_threads()} threads | " + " | ".join(columns) + " |")
        print("|---|" + "---:|" * len(columns))
        print("| total, ms | " + " | ".join(f"{column.total:.0f}" for column in columns.values()) + " |")
        for part in (*PARTS.values(), OTHER, OUTSIDE):
            shares = (f"{column.parts.get(part, 0.0) / column.total:.1%}" for column in columns.values())
            print(f"| {part} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()
