"""What this library must reach, and why it does not where it does not: the one place for both.

The benchmarks print the goals below their tables; ``make report`` puts all of them beside the newest figures. A reason
is written here by whoever found it out, by profile or by count of bytes and operations, never made up by code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .recorded import Recorded
from .report import Goal

# Semantic cross-attention of 65,536 pixels with 19 labels, by whether backward is counted.
CROSS_ATTENTION = {
    False: (
        Goal("ours", "copy", at_most=1.5),
        Goal("Flex", "ours", at_least=4),
        Goal("SDPA", "ours", at_least=15),
    ),
    True: (Goal("dense", "ours", at_least=15),),
}

# The operators on feature maps beside instance norm, at 128 x 128 pixels and above, and below.
MODULATE_LARGE = {
    False: (Goal("ours", "instance_norm", at_most=0.55),),
    True: (Goal("ours", "instance_norm", at_most=1.3),),
}
MODULATE_SMALL = {
    False: (Goal("ours", "instance_norm", at_most=1.2),),
    True: (Goal("ours", "instance_norm", at_most=1.8),),
}
POOL_LARGE = {False: (Goal("ours", "instance_norm", at_most=0.35),)}
POOL_SMALL = {False: (Goal("ours", "instance_norm", at_most=1.5),)}


def module(num_labels: int, backward: bool) -> tuple[Goal, ...]:
    """A whole modulation of 64 channels at 256 x 256 beside the published one."""
    times = {(19, False): 40, (19, True): 50, (151, False): 150, (151, True): 100}[num_labels, backward]
    return tuple(Goal("published", entry, at_least=times) for entry in ("ours", "ours, all labels"))


@dataclass(frozen=True)
class ModelTimes:
    """Times of the others over ours, in inference and training, and ours over the convolutions', in inference."""

    published: tuple[float, float]
    compiled: float
    convolutions: float


MODELS = {
    "CelebAMask-HQ": ModelTimes(published=(8, 5.5), compiled=5, convolutions=1.4),
    "ADE20K": ModelTimes(published=(45, 22), compiled=18, convolutions=1.8),
}
_OUR_MODELS = ("ours", "all labels")


def model(name: str, backward: bool) -> tuple[Goal, ...]:
    """Encoder and generator of a configuration, in inference or a training step; none if no goal is set for it."""
    if name not in MODELS:
        return ()
    beside_published = [Goal("published", ours, at_least=MODELS[name].published[backward]) for ours in _OUR_MODELS]
    if backward:
        return tuple(beside_published)
    return (*beside_published, *_model_beside_compiled(name), *_model_beside_convolutions(name))


def _model_beside_compiled(name: str) -> list[Goal]:
    return [Goal("compiled", ours, at_least=MODELS[name].compiled) for ours in _OUR_MODELS]


def _model_beside_convolutions(name: str) -> list[Goal]:
    floors = ("convolutions", "convolutions of PyTorch")
    return [Goal(ours, floor, at_most=MODELS[name].convolutions) for floor in floors for ours in _OUR_MODELS]


MODEL_MEMORY = tuple(Goal(ours, "published", at_most=0.25) for ours in _OUR_MODELS)
GROWTH_WITH_LABELS = (Goal("151 labels", "3 labels", at_most=1.15),)
GROWTH_WITH_PIXELS = (Goal("1024 x 1024", "256 x 256", at_most=1.15),)
GROWTH_WITH_LATENTS = (Goal("k = 32", "k = 4", at_most=8),)
NOISE = (Goal("dense", "ours", at_least=1), Goal("dense", "ours + plan", at_least=1))
OVERHEAD = (Goal("ours", "instance_norm", at_most=2),)


@dataclass(frozen=True)
class Target:
    """A row of the report's table of goals: the goals share one bound and hold for all comparisons that match.

    Attributes:
        measure: what it is about.
        table, row: regular expressions for the whole title of a table and the whole name of a row.
        goals: with the same bound.
        reason: why it is missed, where it is and somebody found out.
        unmeasured: why nothing here measures it, if nothing does.
    """

    measure: str
    table: str
    row: str
    goals: Sequence[Goal] = ()
    reason: str = ""
    unmeasured: str = ""

    def covers(self, comparison: Recorded) -> bool:
        """Whether the goals are about it."""
        matches = re.fullmatch(self.table, comparison.table) and re.fullmatch(self.row, comparison.row)
        return bool(matches) and comparison.dtype == "float32"


_SHAPES = r"k = 8, NCHW, float32, regions of 19 labels"
_LARGE = r"(64 channels, 256 x 256|128 channels, 128 x 128)"
_SMALL = r"\d+ channels, (64 x 64|32 x 32|16 x 16|8 x 8).*"
_ONE_HEAD = r"k = 8, D = 256, H = 1, float32"
_LINE = r"65,536 pixels, 19 labels"
_SAME_AS_SHOWN = r"forward( \+ backward)?"


def _of_operator(operator: str) -> list[Target]:
    """The goals that the operators on feature maps share."""
    large, small = {
        "semantic_modulate": (MODULATE_LARGE, MODULATE_SMALL),
        "semantic_pool": (POOL_LARGE, POOL_SMALL),
    }[operator]
    return [
        Target(f"`{operator}`, {where}, {name}", rf"{operator}, {re.escape(name)}: {_SHAPES}", rows, goals[backward])
        for where, rows, goals in (("64 and 128 channels", _LARGE, large), ("64 x 64 and below", _SMALL, small))
        for backward, name in ((False, "forward"), (True, "forward + backward"))
        if backward in goals
    ]


def _of_modules() -> list[Target]:
    return [
        Target(
            f"whole modulation, {num_labels} labels, {name}",
            rf"Modulation, (simplex|duplex), {re.escape(name)}: k = 8, D = 256, float32; everything counted",
            rf"64 channels, 256 x 256, {num_labels} labels .*",
            module(num_labels, backward),
        )
        for num_labels in (19, 151)
        for backward, name in ((False, "forward"), (True, "forward + backward"))
    ]


def _of_models() -> list[Target]:
    targets = []
    for name in MODELS:
        rows = rf"{name}, batch 1, .*"
        inference = r"Encoder \+ generator, inference: k = 8, float32"
        step = r"Encoder \+ generator, training step: k = 8, float32"
        beside_published = {backward: model(name, backward)[: len(_OUR_MODELS)] for backward in (False, True)}
        targets += [
            Target(f"encoder + generator, {name}, inference", inference, rows, beside_published[False]),
            Target(f"encoder + generator, {name}, inference", inference, rows, _model_beside_compiled(name)),
            Target(f"encoder + generator, {name}, inference", inference, rows, _model_beside_convolutions(name)),
            Target(f"encoder + generator, {name}, training step", step, rows, beside_published[True]),
        ]
    return targets


_WHY_NOT_FLEX = (
    "the goal came from a FlexAttention that took 26 ms where a copy took 3.6; with the blocks and masks of "
    "`bench/flex.py` it takes less than 8 where a copy takes 2.8"
)
_WHY_LABELS_COST = (
    "all labels occur in these maps: at 256 x 256 a tile of 8 x 32 pixels holds 13.0 labels of 151 on average, but 1.6 "
    "of 3 (counted), each with rows of latents and part-filled vectors of its own; at 64 x 64 each of 151 labels has "
    "27 pixels"
)

TARGETS = [
    *(
        Target(
            "`semantic_cross_attention`, pixels attend, forward",
            rf"Pixels attend to latents, forward: {_ONE_HEAD}",
            _LINE,
            [goal],
            reason=_WHY_NOT_FLEX if goal.numerator == "Flex" else "",
        )
        for goal in CROSS_ATTENTION[False]
    ),
    *_of_operator("semantic_modulate"),
    *_of_operator("semantic_pool"),
    *_of_modules(),
    *_of_models(),
    Target(
        "peak memory of a training step, 151 labels",
        r"Encoder \+ generator, peak memory of a training step: .*",
        r"ADE20K, .*",
        MODEL_MEMORY,
    ),
    Target(
        "growth with labels, `semantic_cross_attention`",
        r"Growth with labels: .*",
        r".*",
        GROWTH_WITH_LABELS,
    ),
    *(
        Target(
            f"growth with labels, `{operator}`",
            rf"{operator}, growth with labels .*",
            r".*",
            GROWTH_WITH_LABELS,
            reason=_WHY_LABELS_COST,
        )
        for operator in ("semantic_modulate", "semantic_pool")
    ),
    Target(
        "growth with pixels, time per pixel",
        r"(.*, g|G)rowth with pixels: time per pixel.*",
        _SAME_AS_SHOWN,
        GROWTH_WITH_PIXELS,
    ),
    Target(
        "growth with latents of a label",
        r"(.*, g|G)rowth with latents (of a|per) label.*",
        _SAME_AS_SHOWN,
        GROWTH_WITH_LATENTS,
    ),
    Target(
        "every pixel its own random label",
        r"(Every pixel its own random label|.* on label maps), .*",
        r"(65,536 pixels|random), \d+ labels",
        NOISE,
    ),
    Target("overhead of a tiny call", r"(.*, o|O)verhead of a call: .*", r"with(out)? gradients", OVERHEAD),
    Target(
        "on a GPU: `semantic_modulate`, bfloat16, >= 75% of the copy bandwidth, >= 10x the compiled published module",
        "",
        "",
        unmeasured="no results from a GPU are recorded",
    ),
    Target(
        "on a GPU: generator, batch 8, bfloat16, >= 5x the published code, >= 3x it compiled",
        "",
        "",
        unmeasured="no results from a GPU are recorded",
    ),
]
