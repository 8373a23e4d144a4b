"""Growth of the operators with pixels, labels and latents of a label, beside the dense formulation.

Every point is a comparison of its own: ``ours``, ``ours + plan`` with a label map that is new in every call, and
``dense``, as far as its tables of all pairs fit into memory. Whether we grow as we must is asked in the benchmarks of
the operators, where all sizes take turns; here are the curves. All labels occur, as far as there are pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import contenders, feature_maps, label_maps, problems
from .contenders import MOST_MASKED_BYTES
from .races import LABELS, PASSES
from .run import Run
from .timing import Contender, skipped

# Sides of square maps, labels, and latents of a label; of a small run, and of a full one.
SIDES = (4, 16), (64, 128, 256, 512, 1024)
LABEL_COUNTS = (1, 30), (1, 3, 10, 30, 100, 300, 1000)
LATENT_COUNTS = (1, 64), (1, 2, 4, 8, 16, 32, 64)
# With labels and latents: so many pixels that the dense formulation fits into memory with 1,000 labels.
SIDE = 128
CHANNELS = 32
WIDTH = 64

# From side, labels, latents and whether backward is counted to ours, ours + plan and dense, and what dense would take.
Point = Callable[[int, int, int, bool], tuple[list[Contender], float]]


def cross_attention(side: int, num_labels: int, latents: int, backward: bool) -> tuple[list[Contender], float]:
    """Pixels attend to latents."""
    labels = label_maps.regions(side, side, num_labels)
    problem = problems.pixels_to_latents(labels, num_labels, problems.Sizes(latents=latents, width=WIDTH))
    expected = problem.expected(backward)
    ways = {
        "ours": contenders.ours(problem),
        "ours + plan": contenders.ours_with_plan(problem),
        "dense": contenders.dense(problem),
    }
    entries = [contenders.entry(name, problem, attend, backward, expected) for name, attend in ways.items()]
    return entries, contenders.masked_bytes(problem)


def on_feature_maps(operator: str) -> Point:
    """An operator on feature maps."""

    def point(side: int, num_labels: int, latents: int, backward: bool) -> tuple[list[Contender], float]:
        labels = label_maps.regions(side, side, num_labels)
        sizes = feature_maps.Sizes(channels=CHANNELS, latents=latents)
        problem = feature_maps.problem(operator, labels, num_labels, sizes)
        ways = {
            "ours": feature_maps.ours(problem),
            "ours + plan": feature_maps.ours(problem, plan_counted=True),
            "dense": feature_maps.dense(problem),
        }
        entries = [problem.entry(name, compute, backward) for name, compute in ways.items()]
        return entries, feature_maps.masked_bytes(problem)

    return point


OPERATORS: dict[str, Point] = {
    "semantic_cross_attention": cross_attention,
    **{operator: on_feature_maps(operator) for operator in ("semantic_modulate", "semantic_pool")},
}
each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_pass = pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)


@each_pass
@each_operator
def test_pixels(run: Run, operator: str, backward: bool) -> None:
    for side in run.choose(*SIDES):
        _compare(run, operator, backward, "pixels", side * side, side, LABELS, 8, "19 labels of 8 latents")


@each_pass
@each_operator
def test_labels(run: Run, operator: str, backward: bool) -> None:
    side = run.choose(8, SIDE)
    for count in run.choose(*LABEL_COUNTS):
        _compare(run, operator, backward, "labels", count, side, count, 8, "16,384 pixels, 8 latents per label")


@each_pass
@each_operator
def test_latents(run: Run, operator: str, backward: bool) -> None:
    side = run.choose(8, SIDE)
    for count in run.choose(*LATENT_COUNTS):
        _compare(run, operator, backward, "latents", count, side, LABELS, count, "16,384 pixels, 19 labels")


def _compare(
    run: Run, operator: str, backward: bool, what: str, count: int, side: int, num_labels: int, latents: int, fixed: str
) -> None:
    (*ours, dense), needed = OPERATORS[operator](side, num_labels, latents, backward)
    fits = needed <= MOST_MASKED_BYTES
    reason = f"its tables of all pairs would take {needed / 1e9:.1f} GB"
    width = f"D = {WIDTH}" if operator == "semantic_cross_attention" else f"{CHANNELS} channels, NCHW"
    run.compare(
        [*ours, dense] if fits else ours,
        table=f"Growth with {what}, {operator}, {PASSES[backward]}: {fixed}, {width}, float32",
        row=f"{count:,} {what}",
        absent=() if fits else [skipped("dense", dense.shape, reason)],
        seconds=1.0,
    )
