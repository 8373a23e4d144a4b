"""The breakdown in docs/profile.md: every part is found, and nothing is counted twice."""

from __future__ import annotations

import pytest

from bench import label_maps
from bench.whole_model_profile import OTHER, OUTSIDE, PARTS, break_down
from bench.whole_models import Problem, Sizes


def test_parts_add_up_to_the_whole() -> None:
    problem = Problem(Sizes("CelebAMask-HQ", 19).reduced(), label_maps.parts)
    breakdown = break_down(problem.ours("ours", backward=True))
    everywhere = {"convolutions", "matrix products of the latents", "semantic_modulate", "label plans", OTHER, OUTSIDE}
    assert everywhere <= set(breakdown.parts) <= {*PARTS.values(), OTHER, OUTSIDE}
    assert sum(breakdown.parts.values()) == pytest.approx(breakdown.total)
    assert all(milliseconds > 0 for milliseconds in breakdown.parts.values())
