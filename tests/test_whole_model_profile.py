"""The breakdown in docs/profile.md: every part is found, and nothing is counted twice."""

from __future__ import annotations

import pytest
import torch

from bench import label_maps
from bench.timing import Contender
from bench.whole_model_profile import OTHER, OUTSIDE, PARTS, PARTS_OF_PUBLISHED, break_down, measure
from bench.whole_models import Problem, Sizes


def test_parts_add_up_to_the_whole() -> None:
    problem = Problem(Sizes("CelebAMask-HQ", 19).reduced(), label_maps.parts)
    breakdown = break_down(problem.ours("ours", backward=True))
    everywhere = {"convolutions", "matrix products of the latents", "semantic_modulate", "label plans", OTHER, OUTSIDE}
    assert everywhere <= set(breakdown.parts) <= {*PARTS.values(), OTHER, OUTSIDE}
    assert sum(breakdown.parts.values()) == pytest.approx(breakdown.total)
    assert all(milliseconds > 0 for milliseconds in breakdown.parts.values())


def test_published_parts_become_figures_of_a_checked_result() -> None:
    problem = Problem(Sizes("CelebAMask-HQ", 19).reduced(), label_maps.parts)
    figures = measure(problem.as_published("before", backward=False), False, PARTS_OF_PUBLISHED, runs=1)
    everywhere = {"convolutions", "matrix products", "softmax", "masking", "instance norms", "copies", OTHER, OUTSIDE}
    assert everywhere <= {figure.name for figure in figures} <= {*PARTS_OF_PUBLISHED.values(), OTHER, OUTSIDE}
    assert all(figure.error is not None and figure.median is not None for figure in figures)


def test_nothing_is_said_of_a_wrong_result() -> None:
    wrong = Contender("ours", lambda: (torch.ones(2),), (torch.zeros(2),), {})
    (figure,) = measure(wrong, False, PARTS, runs=1)
    assert figure.failed and figure.median is None
