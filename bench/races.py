"""What the operators on feature maps are asked to show; ``bench_<operator>.py`` says how well they must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from . import contenders, feature_maps, label_maps, memory, timing
from .feature_maps import Problem, Sizes
from .goals import GROWTH_WITH_LABELS, GROWTH_WITH_LATENTS, GROWTH_WITH_PIXELS, OVERHEAD
from .report import Goal
from .run import Run
from .timing import Contender, Figure, skipped

PASSES = {False: "forward", True: "forward + backward"}
LABELS = 19
# Beside noise, which has benchmarks of its own.
KINDS = [kind for kind in label_maps.makers() if kind != "random"]


def make(
    run: Run, operator: str, side: int, sizes: Sizes, *, num_labels: int = LABELS, kind: str = "regions"
) -> Problem:
    """A call on a square feature map, which is smaller in a small run."""
    side = run.choose(max(8, side // 16), side)
    labels = label_maps.makers()[kind](side, side, num_labels)
    sizes = replace(sizes, channels=run.choose(min(40, sizes.channels), sizes.channels))
    return feature_maps.problem(operator, labels, num_labels, sizes)


def labels_of(kind: str) -> int:
    """How many labels a kind of label map is made with."""
    return label_maps.PHOTOGRAPHED_LABELS if kind.startswith("photograph") else LABELS


def against_instance_norm(
    run: Run, operator: str, channels: int, side: int, sizes: Sizes, goals: Mapping[bool, Sequence[Goal]]
) -> None:
    """One shape of the published models in one type and order, in both passes."""
    sizes = replace(sizes, channels=channels)
    problem = make(run, operator, side, sizes)
    for backward, name in PASSES.items():
        present = problem.shape["labels_present"]
        run.compare(
            [
                problem.entry("ours", feature_maps.ours(problem), backward),
                feature_maps.instance_norm(problem, backward),
                feature_maps.copy(problem),
            ],
            table=f"{operator}, {name}: {sizes.describe()}, regions of 19 labels",
            row=f"{channels} channels, {side} x {side}" + ("" if present == LABELS else f", {present} labels present"),
            dtype=problem.dtype,
            goals=goals.get(backward, ()),
            seconds=1.2 if side >= 128 else 0.5,
        )


def against_dense(run: Run, operator: str, num_labels: int, kind: str, goals: Sequence[Goal]) -> None:
    """A kind of label map, against the formulations of PyTorch, in both passes; making the plan is timed as well."""
    problem = make(run, operator, 256, Sizes(), num_labels=num_labels, kind=kind)
    for backward, name in PASSES.items():
        entries = [
            problem.entry("ours", feature_maps.ours(problem), backward),
            problem.entry("ours + plan", feature_maps.ours(problem, plan_counted=True), backward),
            feature_maps.instance_norm(problem, backward),
            problem.entry("loop", feature_maps.by_label(problem), backward),
        ]
        absent: list[Figure] = []
        needed = feature_maps.masked_bytes(problem)
        if needed > contenders.MOST_MASKED_BYTES:
            reason = f"mask, logits, masked logits and weights would take {needed / 1e9:.1f} GB"
            absent += [skipped(name, problem.shape, reason) for name in ("dense", "autocast")]
        else:
            entries.append(problem.entry("dense", feature_maps.dense(problem), backward))
            if timing.has_bfloat16():
                entries.append(contenders.autocast(replace(entries[-1], name="autocast")))
            else:
                absent.append(skipped("autocast", problem.shape, "this processor has no bfloat16"))
            if kind == "regions":
                # It takes as long for any other map, and compiling takes longer than all the rest.
                compiled = run.compile(feature_maps.dense(problem))
                entries.append(problem.entry("compiled", compiled, backward))
        run.compare(
            entries,
            table=f"{operator} on label maps, {name}: 64 channels, 256 x 256, {Sizes().describe()}",
            row=f"{kind}, {num_labels} labels",
            goals=goals,
            absent=absent,
            seconds=1.0,
        )


def threads(run: Run, operator: str, count: int) -> None:
    """The largest shape with a number of threads."""
    problem = make(run, operator, 256, Sizes())
    with timing.threads(count):
        for backward, name in PASSES.items():
            run.compare(
                [
                    problem.entry("ours", feature_maps.ours(problem), backward),
                    feature_maps.instance_norm(problem, backward),
                    problem.entry("dense", feature_maps.dense(problem), backward),
                ],
                table=f"Threads, {operator}, {name}: 64 channels, 256 x 256, 19 labels, {Sizes().describe()}",
                row=f"{count} thread{'s' * (count > 1)}",
                seconds=1.5,
            )


def growth_with_labels(run: Run, operator: str, channels: int, side: int, backward: bool) -> None:
    """Time must not depend on the number of labels."""
    problems = [make(run, operator, side, Sizes(channels), num_labels=count) for count in (3, 19, 151)]
    for counted in (False, True):
        run.compare(
            [
                problem.entry(
                    f"{problem.layout.num_labels} labels", feature_maps.ours(problem, plan_counted=counted), backward
                )
                for problem in problems
            ],
            table=f"{operator}, growth with labels (regions): {Sizes().describe()}",
            row=f"{channels} channels, {side} x {side}, {PASSES[backward]}{', plan counted' if counted else ''}",
            goals=GROWTH_WITH_LABELS,
            seconds=1.5,
        )


def growth_with_pixels(run: Run, operator: str, backward: bool) -> None:
    """Time must be linear in the pixels."""
    entries = []
    for side in (256, 64, 128, 512, 1024):
        problem = make(run, operator, side, Sizes(channels=32))
        whole = problem.entry(f"{side} x {side}", feature_maps.ours(problem, plan_counted=True), backward)
        entries.append(replace(whole, work=problem.noise.numel() / 1e6))
    run.compare(
        entries,
        table=f"{operator}, growth with pixels: time per pixel, 32 channels, 19 labels, {Sizes().describe()}, "
        "plan counted",
        row=PASSES[backward],
        unit="ns",
        goals=GROWTH_WITH_PIXELS,
    )


def growth_with_latents(run: Run, operator: str, backward: bool) -> None:
    """Time must be at most linear in the latents of a label."""
    problems = [make(run, operator, 256, Sizes(latents=latents)) for latents in (4, 8, 16, 32)]
    run.compare(
        [
            problem.entry(f"k = {problem.layout.max_per_label}", feature_maps.ours(problem), backward)
            for problem in problems
        ],
        table=f"{operator}, growth with latents of a label: 64 channels, 256 x 256, 19 labels, NCHW, float32",
        row=PASSES[backward],
        goals=GROWTH_WITH_LATENTS,
        seconds=2.0,
    )


def overhead(run: Run, operator: str, with_gradients: bool) -> None:
    """A call so small that only the way to the kernel counts."""
    labels = label_maps.regions(4, 4, 2)
    problem = feature_maps.problem(operator, labels, 2, Sizes(channels=8, latents=2))
    compute, expected = feature_maps.ours(problem), problem.expected(backward=False)
    x = problem.x.clone().requires_grad_(with_gradients)
    rows = {name: row.clone().requires_grad_(with_gradients) for name, row in problem.rows.items()}
    normalised = (F.instance_norm(problem.x.double()),)
    microsecond = 1e-3
    run.compare(
        [
            Contender("ours", lambda: compute(x, rows), expected, problem.shape, microsecond),
            Contender("instance_norm", lambda: (F.instance_norm(x),), normalised, problem.shape, microsecond),
        ],
        table=f"{operator}, overhead of a call: 8 channels, 4 x 4 pixels, 2 labels of 2 latents, forward",
        row="with gradients" if with_gradients else "without gradients",
        unit="us",
        goals=OVERHEAD,
        seconds=1.0,
    )


def peak_memory(run: Run, operator: str, goals: Sequence[Goal]) -> None:
    """Forward + backward beside the least that must be there, and beside the dense formulation."""
    assert memory.counts_correctly(), "the profiler does not report allocations as expected"
    problem = make(run, operator, 256, Sizes())
    inputs = (problem.x, *problem.rows.values(), problem.noise, *problem.gradients)
    results = problem.task(feature_maps.ours(problem), backward=True)()
    input_bytes = sum(tensor.nbytes for tensor in inputs)
    peaks = {"inputs and results": sum(tensor.nbytes for tensor in results)}
    for name, compute in {
        "ours": feature_maps.ours(problem, plan_counted=True),
        "dense": feature_maps.dense(problem),
    }.items():
        peaks[name] = memory.peak_bytes(problem.task(compute, backward=True))
    figures = []
    for name, peak in peaks.items():
        mebibytes = (input_bytes + peak) / 2**20
        figures.append(
            Figure(name, problem.shape, median=mebibytes, lower=mebibytes, upper=mebibytes, rounds=(mebibytes,))
        )
    run.record(
        figures,
        table=f"{operator}, peak memory of forward + backward: 64 channels, 256 x 256, 19 labels, "
        f"{Sizes().describe()}; the mask is not counted, our plan is",
        row="tensor memory",
        unit="MiB",
        goals=goals,
    )


ORDERS_AND_TYPES = [
    Sizes(dtype=dtype, channels_last=channels_last)
    for dtype in (torch.float32, torch.bfloat16)
    for channels_last in (False, True)
]
