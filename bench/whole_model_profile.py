"""Where the time of encoder and generator goes: ``python -m bench.whole_model_profile`` prints the tables of
``docs/profile.md``, and with ``--record`` adds ours and the published networks to the results, for the report.

PyTorch's profiler counts for every operator the time that no other operator inside it takes. What is left of the time
of a run is Python, PyTorch on the way to its operators, and the profiler's own work, which the time of a run without it
tells apart.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile

from . import label_maps, report, timing
from .bench_scam_models import MEMORY_ORDER
from .catalogue import OTHER
from .report import Comparison
from .run import current_allocator
from .timing import Contender, Figure
from .whole_models import CONFIGURATIONS, PASSES, TOLERANCE, Problem

RUNS = 5
RUNS_OF_PUBLISHED = 2  # of up to half a minute
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
PARTS_OF_PUBLISHED = {
    "conv": "convolutions",
    "mm": "matrix products",
    "softmax": "softmax",
    "masked_fill": "masking",
    "upsample": "nearest upsampling",
    "layer_norm": "layer norms",
    "batch_norm": "instance norms",
    "copy_": "copies",
}
OUTSIDE = "Python, the way to the operators, the profiler"


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a run without the profiler, with it, and of each part of the latter."""

    unprofiled: float
    total: float
    parts: dict[str, float]


def break_down(contender: Contender, signs: Mapping[str, str] = PARTS, runs: int = RUNS) -> Breakdown:
    """The mean over some runs, of parts that are found by signs in the names of operators."""
    _time_runs(contender, min(2, runs - 1))
    unprofiled = _time_runs(contender, runs)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        total = _time_runs(contender, runs)
    parts: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = next((part for sign, part in signs.items() if sign in event.key), OTHER)
        parts[name] += event.self_cpu_time_total / 1e3 / runs
    parts[OUTSIDE] = total - sum(parts.values())
    return Breakdown(unprofiled, total, dict(parts))


def _time_runs(contender: Contender, runs: int) -> float:
    """Milliseconds of all runs over their number."""
    start = time.perf_counter()
    for _ in range(runs):
        contender.run()
    return (time.perf_counter() - start) * 1e3 / max(runs, 1)


def measure(contender: Contender, backward: bool, signs: Mapping[str, str], runs: int) -> list[Figure]:
    """The parts as figures, of a contender whose result is right."""
    (checked,) = timing.compare([contender], TOLERANCE[torch.float32][backward], None)
    if checked.failed:
        return [checked]
    return [
        replace(checked, name=part, median=value, lower=value, upper=value, rounds=(value,))
        for part, value in break_down(contender, signs, runs).parts.items()
    ]


def record(problems: Mapping[str, Problem]) -> None:
    """Adds the parts of the published networks, before, and of ours, after, to the results."""
    machine = report.describe_machine(current_allocator())
    for backward, title in PASSES.items():
        for name, problem in problems.items():
            settings = {"backward": backward, "memory_format": MEMORY_ORDER[backward]}
            ways = {
                "before": (problem.as_published(name, backward=backward), PARTS_OF_PUBLISHED, RUNS_OF_PUBLISHED),
                "after": (problem.ours(name, **settings), PARTS, RUNS),
            }
            for way, (contender, signs, runs) in ways.items():
                figures = measure(contender, backward, signs, runs)
                table = f"Where the time goes, {title}: k = 8, batch {problem.sizes.batch}, float32"
                row = f"{name}, {way}"
                report.append(
                    Comparison("profile", table, row, figures, torch.float32, torch.get_num_threads()), machine
                )


def main() -> None:
    """Prints a table for inference and one for a training step."""
    problems = {name: Problem(CONFIGURATIONS[name], label_maps.parts) for name in ("CelebAMask-HQ", "ADE20K")}
    if "--record" in sys.argv[1:]:
        record(problems)
        return
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
