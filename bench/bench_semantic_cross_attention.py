"""Semantic cross-attention against the published dense formulation and what PyTorch offers instead.

:mod:`bench.contenders` explains the names in the tables.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sca_kernels import LabelMap

from . import contenders, flex, label_maps, memory, races, timing
from .contenders import entry
from .dense import attention, attention_by_label, blocked_pairs
from .goals import (
    CROSS_ATTENTION,
    GROWTH_WITH_LABELS,
    GROWTH_WITH_LATENTS,
    GROWTH_WITH_PIXELS,
    NOISE,
    OVERHEAD,
)
from .problems import Problem, Sizes, latents_to_latents, latents_to_pixels, pixels_to_latents
from .report import Goal
from .run import Run
from .timing import Contender, Figure, skipped

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

PASSES = {False: "forward", True: "forward + backward"}
HEADLINE_SIDE, HEADLINE_LABELS = 256, 19


@pytest.mark.parametrize("num_labels", [3, 19, 151])
@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_pixels_to_latents(run: Run, side: int, num_labels: int) -> None:
    problem = _pixels_to_latents(run, side, num_labels)
    headline = (side, num_labels) == (HEADLINE_SIDE, HEADLINE_LABELS)
    _race(
        run,
        problem,
        f"{side * side:,} pixels, {num_labels} labels",
        goals=CROSS_ATTENTION if headline else {},
        compiled=True,
    )


@pytest.mark.parametrize("sizes", [Sizes(heads=4, width=64), Sizes(dtype=torch.bfloat16)])
def test_heads_and_types(run: Run, sizes: Sizes) -> None:
    problem = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS, sizes)
    _race(run, problem, "65,536 pixels, 19 labels", goals={}, compiled=True)


@pytest.mark.parametrize("count", [1, 2])
def test_threads(run: Run, count: int) -> None:
    problem = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS)
    with timing.threads(count):
        _race(
            run,
            problem,
            f"{count} thread{'s' * (count > 1)}",
            title="Threads, 65,536 pixels",
            goals=CROSS_ATTENTION,
        )


@pytest.mark.parametrize("num_labels", [3, 19, 151])
def test_every_pixel_its_own_label(run: Run, num_labels: int) -> None:
    problem = _pixels_to_latents(run, HEADLINE_SIDE, num_labels, kind="random")
    _race(
        run,
        problem,
        f"65,536 pixels, {num_labels} labels",
        title="Every pixel its own random label",
        goals=dict.fromkeys(PASSES, NOISE),
    )


@pytest.mark.parametrize("num_labels", [19, 151])
def test_latents_to_pixels(run: Run, num_labels: int) -> None:
    side = run.choose(16, HEADLINE_SIDE)
    labels = label_maps.regions(side, side, num_labels)
    problem = latents_to_pixels(labels, num_labels, _scaled(run, Sizes()))
    _race_masked(run, problem, f"65,536 pixels, {num_labels} labels", "Latents attend to pixels")


@pytest.mark.parametrize("num_labels", [19, 151])
def test_latents_to_latents(run: Run, num_labels: int) -> None:
    problem = latents_to_latents(num_labels, _scaled(run, Sizes()))
    _race_masked(run, problem, f"{num_labels} labels", "Latents attend to latents")


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_label_maps(run: Run, backward: bool) -> None:
    entries = []
    for kind in label_maps.makers():
        problem = _pixels_to_latents(run, HEADLINE_SIDE, races.labels_of(kind), kind=kind)
        entries.append(entry(kind, problem, contenders.ours_with_plan(problem), backward))
    entries.append(entry("dense, any map", problem, contenders.dense(problem), backward))
    run.compare(
        entries,
        table="Label maps: 65,536 pixels, 19 labels (photographs: 3) of 8 latents, D = 256, plan counted",
        row=PASSES[backward],
    )


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("counted", [False, True])
def test_growth_with_labels(run: Run, side: int, counted: bool, backward: bool) -> None:
    attention_of = contenders.ours_with_plan if counted else contenders.ours
    entries = []
    for num_labels in (3, 19, 151):
        problem = _pixels_to_latents(run, side, num_labels)
        entries.append(entry(f"{num_labels} labels", problem, attention_of(problem), backward))
    run.compare(
        entries,
        table="Growth with labels: 8 latents each, D = 256",
        row=f"{side * side:,} pixels, {PASSES[backward]}{', plan counted' if counted else ''}",
        goals=GROWTH_WITH_LABELS,
        seconds=2.0,
    )


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_growth_with_pixels(run: Run, backward: bool) -> None:
    entries = []
    for side in (256, 64, 128, 512, 1024):
        problem = _pixels_to_latents(run, side, HEADLINE_LABELS, Sizes(width=64))
        attend = contenders.ours_with_plan(problem)
        million_pixels = problem.query.shape[2] / 1e6
        whole = entry(f"{side} x {side}", problem, attend, backward)
        entries.append(replace(whole, work=million_pixels))
    run.compare(
        entries,
        table="Growth with pixels: time per pixel, 19 labels of 8 latents, D = 64, plan counted",
        row=PASSES[backward],
        unit="ns",
        goals=GROWTH_WITH_PIXELS,
    )


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_growth_with_latents(run: Run, backward: bool) -> None:
    entries = []
    for latents in (4, 8, 16, 32):
        problem = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS, Sizes(latents=latents))
        entries.append(entry(f"k = {latents}", problem, contenders.ours(problem), backward))
    run.compare(
        entries,
        table="Growth with latents per label: 65,536 pixels, 19 labels, D = 256",
        row=PASSES[backward],
        goals=GROWTH_WITH_LATENTS,
    )


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_channels_first(run: Run, backward: bool) -> None:
    """Pixels as a convolution leaves them, (B, C, H, W), seen as tokens through their strides."""
    last = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS)
    first = replace(last, query=_channels_first(last.query), grad_out=_channels_first(last.grad_out))
    attend = contenders.ours(first)

    def rearranged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _channels_first(attend(query.contiguous(), key, value))

    expected = first.expected()
    run.compare(
        [
            entry("ours", first, attend, backward, expected),
            contenders.copy(first.query),
            entry("rearranged", first, rearranged, backward, expected),
            entry("channels last", last, attend, backward, expected),
        ],
        table="Channels first: 65,536 pixels, 19 labels of 8 latents, D = 256; query, output and its "
        "gradient in NCHW memory",
        row=PASSES[backward],
    )


@pytest.mark.parametrize("with_gradients", [False, True])
def test_overhead(run: Run, with_gradients: bool) -> None:
    sizes = Sizes(latents=2, width=8)
    problem = pixels_to_latents(label_maps.regions(4, 4, 2), 2, sizes)
    query, key, value, image = (
        tensor.detach().requires_grad_(with_gradients)
        for tensor in (problem.query, problem.key, problem.value, torch.randn(1, 8, 4, 4))
    )
    attend = contenders.ours(problem)
    normalised = F.instance_norm(image.detach().double())
    microsecond = 1e-3
    run.compare(
        [
            Contender(
                "ours", lambda: (attend(query, key, value),), problem.expected(False), problem.shape, microsecond
            ),
            Contender(
                "instance_norm",
                lambda: (F.instance_norm(image),),
                (normalised,),
                {"elements": image.numel()},
                microsecond,
            ),
        ],
        table="Overhead of a call: 4 x 4 pixels, 2 labels of 2 latents, D = 8, forward",
        row="with gradients" if with_gradients else "without gradients",
        unit="us",
        goals=OVERHEAD,
        seconds=2.0,
    )


def test_peak_memory(run: Run) -> None:
    assert memory.counts_correctly(), "the profiler does not report allocations as expected"
    problem = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS)
    inputs = (problem.query, problem.key, problem.value, problem.grad_out)
    results = problem.task(contenders.ours(problem), backward=True)()
    input_bytes = sum(tensor.nbytes for tensor in inputs)
    floor = input_bytes + sum(tensor.nbytes for tensor in results)
    figures = [_mebibytes("inputs and results", problem, floor)]
    attentions = {
        "ours": contenders.ours_with_plan(problem),
        "dense": contenders.dense(problem),
        "SDPA": contenders.sdpa(problem),
    }
    for name, attend in attentions.items():
        peak = memory.peak_bytes(problem.task(attend, backward=True))
        figures.append(_mebibytes(name, problem, input_bytes + peak))
    run.record(
        figures,
        table="Peak memory of forward + backward: 65,536 pixels, 19 labels of 8 latents, D = 256; "
        "masks not counted, our plan is",
        row="tensor memory",
        unit="MiB",
        goals=(Goal("ours", "inputs and results", at_most=1.1),),
    )


def test_flex_block_sizes(run: Run) -> None:
    """Whether the sizes in :mod:`bench.flex` are still the best ones."""
    problem = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS)
    expected = problem.expected()
    attend = run.compile(flex_attention)
    chosen = flex.BLOCKS[problem.dtype]
    run.compare(
        [
            contenders.flex_on_sorted(problem, expected, attend, blocks)
            for blocks in sorted(flex.RIVAL_BLOCKS, key=lambda blocks: blocks != chosen)
        ],
        table="FlexAttention, pixels x latents in a block: 65,536 pixels, 19 labels of 8 latents, D = 256",
        row="forward",
    )


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_sdpa_masks(run: Run, backward: bool) -> None:
    """Whether the boolean mask used above is SDPA's better one."""
    problem = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS)
    run.compare(
        [
            entry("boolean mask", problem, contenders.sdpa(problem), backward),
            entry("float mask", problem, contenders.sdpa_with_float_mask(problem), backward),
        ],
        table="SDPA's masks: 65,536 pixels, 19 labels of 8 latents, D = 256",
        row=PASSES[backward],
    )


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_default_allocator(run: Run, backward: bool) -> None:
    """The headline again in a process whose C library returns freed memory to the system."""
    if not run.full:
        pytest.skip("differs from test_pixels_to_latents in its times only")
    defaults = {name: value for name, value in os.environ.items() if name not in timing.REUSED_MEMORY}
    with (
        mock.patch.dict(os.environ, defaults, clear=True),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes,
    ):
        figures = processes.submit(_headline_figures, backward, torch.get_num_threads()).result()
    run.record(
        figures,
        table="The system's default allocator: page faults in every large result",
        row=f"65,536 pixels, 19 labels, {PASSES[backward]}",
        goals=CROSS_ATTENTION[backward],
        allocator="system default",
    )


@pytest.mark.parametrize("num_labels", [3, 40])
def test_reference_by_label(num_labels: int) -> None:
    """What every contender is checked against is the dense formulation, absent labels included."""
    problem = latents_to_pixels(label_maps.blocks(8, 8, 3), num_labels, Sizes(width=8))
    query, key, value = (t.double() for t in (problem.query, problem.key, problem.value))
    blocked = blocked_pairs(problem.query_labels, problem.key_labels)
    by_label = attention_by_label(query, key, value, problem.query_labels, problem.key_labels)
    assert timing.relative_error(by_label, attention(query, key, value, blocked)) < 1e-12


def _pixels_to_latents(
    run: Run, side: int, num_labels: int, sizes: Sizes | None = None, kind: str = "regions"
) -> Problem:
    side = run.choose(max(4, side // 16), side)
    labels = label_maps.makers()[kind](side, side, num_labels)
    return pixels_to_latents(labels, num_labels, _scaled(run, sizes or Sizes()))


def _scaled(run: Run, sizes: Sizes) -> Sizes:
    return replace(sizes, width=run.choose(16, sizes.width))


def _title(problem: Problem, what: str, backward: bool) -> str:
    heads, width = problem.query.shape[1], problem.query.shape[3]
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{what}, {PASSES[backward]}: k = {problem.latents}, D = {width}, H = {heads}, {dtype}"


def _race(
    run: Run,
    problem: Problem,
    row: str,
    *,
    title: str = "Pixels attend to latents",
    goals: Mapping[bool, Sequence[Goal]],
    compiled: bool = False,
) -> None:
    """Pixels that attend to latents, against everyone, in both passes."""
    expected = problem.expected()
    for backward in PASSES:
        present, absent = contenders.lineup(problem, expected, backward, run.compile if compiled else None)
        run.compare(
            present,
            table=_title(problem, title, backward),
            row=row,
            dtype=problem.dtype,
            goals=goals.get(backward, ()),
            absent=absent,
        )


def _race_masked(run: Run, problem: Problem, row: str, title: str) -> None:
    """Queries that are latents, against the formulations with a mask, in both passes."""
    expected = problem.expected()
    attentions = {"ours": contenders.ours(problem)}
    if isinstance(problem.key_tokens, LabelMap):
        attentions["ours + plan"] = contenders.ours_with_plan(problem)
    attentions["dense"] = contenders.dense(problem)
    absent = []
    if torch.isin(problem.query_labels, problem.key_labels).all():
        attentions["SDPA"] = contenders.sdpa(problem)
    else:
        absent.append(skipped("SDPA", problem.shape, "no mask gives a label without pixels the mean of all values"))
    for backward in PASSES:
        run.compare(
            [entry(name, problem, attend, backward, expected) for name, attend in attentions.items()],
            table=_title(problem, title, backward),
            row=row,
            absent=absent,
        )


def _headline_figures(backward: bool, thread_count: int) -> list[Figure]:
    """Runs in a process of its own."""
    with timing.threads(thread_count):
        run = Run(full=True)
        problem = _pixels_to_latents(run, HEADLINE_SIDE, HEADLINE_LABELS)
        present, absent = contenders.lineup(problem, problem.expected(), backward, run.compile)
        return [*timing.compare(present, timing.TOLERANCE[problem.dtype], timing.Pace()), *absent]


def _channels_first(tokens: Tensor) -> Tensor:
    """The same values, (1, H, N, D), with the memory order (1, H, D, N)."""
    return tokens.mT.contiguous().mT


def _mebibytes(name: str, problem: Problem, size: int) -> Figure:
    value = size / 2**20
    return Figure(name, problem.shape, median=value, lower=value, upper=value, rounds=(value,))
