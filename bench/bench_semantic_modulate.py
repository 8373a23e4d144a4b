"""Semantic modulation beside instance norm of the same feature map, and beside the dense formulation.

:mod:`bench.feature_maps` explains the names in the tables. The statistics of the instance norm are part of every call.
"""

from __future__ import annotations

import pytest

from . import feature_maps, goals, races
from .feature_maps import Sizes
from .races import PASSES
from .report import Goal
from .run import Run

OPERATOR = "semantic_modulate"


@pytest.mark.parametrize("sizes", races.ORDERS_AND_TYPES, ids=Sizes.describe)
@pytest.mark.parametrize("channels, side", feature_maps.SHAPES)
def test_shapes(run: Run, channels: int, side: int, sizes: Sizes) -> None:
    wanted = goals.MODULATE_LARGE if side >= 128 else goals.MODULATE_SMALL
    races.against_instance_norm(run, OPERATOR, channels, side, sizes, wanted if sizes == Sizes() else {})


@pytest.mark.parametrize("num_labels", [3, 19, 151])
def test_every_pixel_its_own_label(run: Run, num_labels: int) -> None:
    races.against_dense(run, OPERATOR, num_labels, "random", goals.NOISE)


@pytest.mark.parametrize("kind", races.KINDS)
def test_label_maps(run: Run, kind: str) -> None:
    races.against_dense(run, OPERATOR, races.labels_of(kind), kind, ())


@pytest.mark.parametrize("count", [1, 2])
def test_threads(run: Run, count: int) -> None:
    races.threads(run, OPERATOR, count)


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
@pytest.mark.parametrize("channels, side", [(64, 256), (256, 64)])
def test_growth_with_labels(run: Run, channels: int, side: int, backward: bool) -> None:
    races.growth_with_labels(run, OPERATOR, channels, side, backward)


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_growth_with_pixels(run: Run, backward: bool) -> None:
    races.growth_with_pixels(run, OPERATOR, backward)


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
def test_growth_with_latents(run: Run, backward: bool) -> None:
    races.growth_with_latents(run, OPERATOR, backward)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_overhead(run: Run, with_gradients: bool) -> None:
    races.overhead(run, OPERATOR, with_gradients)


def test_peak_memory(run: Run) -> None:
    races.peak_memory(run, OPERATOR, (Goal("ours", "inputs and results", at_most=1.1),))
