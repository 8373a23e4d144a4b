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


_WHY_NOT_ATTENTION = {
    "ours": (
        "met with AVX-512; without it the 268 million multiply-adds (counted) alone take 3.4 ms at the rate of the "
        "convolutions on these cores, 80 billion in a second, where a copy takes 4.4"
    ),
    "Flex": (
        "the goal came from a FlexAttention that took 26 ms where a copy took 3.6; with the blocks and masks of "
        "`bench/flex.py` it takes less than 8 where a copy takes 2.8. On the Xeon ours takes as long as the copy"
    ),
    "SDPA": (
        "met on the EPYC with AVX-512; without it SDPA takes 76 ms, little more than with it (60), but ours 8.3 (3.8). "
        "On the Xeon ours takes as long as the copy, 6 ms, and SDPA 69"
    ),
}
_WHY_LABELS_COST = (
    "all labels occur in these maps: at 256 x 256 a tile of 8 x 32 pixels holds 13.0 labels of 151 on average, but 1.6 "
    "of 3 (counted), each with rows of latents and part-filled vectors of its own; at 64 x 64 each of 151 labels has "
    "27 pixels, whose features are fewer bytes than the rows of its 8 latents"
)
_WHY_ROWS_COST = "the rows of keys and values, and their gradients, of 151 labels are 5 MB; those of 3 stay in a cache"
_OPERATIONS = (
    "counted: 88 multiply-adds for each number of the map (logits twice, scale and shift, and the gradients of all of "
    "them, for 8 latents), where instance norm has about ten"
)
_MIXED_TILES = (
    "the goal came from a map of rectangles (the row of blocks below): one label in a tile of 8 x 32 pixels. Regions "
    "leave 2.9 in a tile, which is then turned, so that pixels can be taken one by one: regions take "
)
_WHY_NOT_LARGE = {
    "semantic_modulate": {
        False: _MIXED_TILES
        + "1.2 to 1.5 times the time of rectangles. Profiled (AVX-512, one thread): turning and writing 27 %, "
        "logits and softmax 24 %, the modulation 23 %, statistics 13 %; of the rest nothing has more than 5 %. Nothing "
        "gained: parts of vectors of a label's pixels where they lie (1.4 to 1.6 vectors for each vector of pixels), "
        "tiles of other sizes, squares loaded in units of 16 bytes, fetching further ahead than the next row",
        True: _OPERATIONS,
    },
    "semantic_pool": {False: _MIXED_TILES + "1.3 to 1.8 times the time of rectangles"},
}
_WHY_NOT_SMALL = {
    "semantic_modulate": {
        False: (
            "counted: at 8 x 8 the rows of 152 latents (keys, scale, shift) are 1.9 MB, the map is 0.26 MB; and a call "
            "of instance norm takes so little that the way to the kernel counts"
        ),
        True: "counted: at 8 x 8 the rows of 152 latents and their gradients are 3.7 MB, the map and its own 0.8 MB",
    },
    "semantic_pool": {
        False: (
            "counted: with 1,024 channels the rows of 152 latents and what they pool are 1.2 MB, the map is 0.26 MB at "
            "8 x 8 and 1 MB at 16 x 16"
        ),
    },
}
_IN_TURNS = (
    "measured with other operators, not in turns with the dense formulations, which leave nothing of the map in the "
    "caches, it is {} of instance norm's time with AVX-512 and {} with AVX2"
)
_WHY_NOT_BLOCKS = {
    "semantic_modulate": {False: _IN_TURNS.format("0.5 to 0.6", "1"), True: _OPERATIONS},
    "semantic_pool": {False: _IN_TURNS.format("0.35 to 0.5", "0.65 to 0.8")},
}
_WHY_NOT_MODULE = (
    "profiled (AVX2): 60 to 80 % of the time are the operators themselves, 5 to 20 % products of the latents, 5 to "
    "15 % Python and the way to the operators; the rest are small operators"
)
_WHY_NOT_MODEL = (
    "the published code takes only some 7 times as long as its convolutions alone at 19 labels (5 in training), 40 "
    "(23) at 151, so that attention would have to be nearly free; docs/profile.md has the shares of what is left"
)
_WHY_OVERHEAD = (
    "profiled: a call like an earlier one skips its checks; half of what is left are steps of Python's interpreter. "
    "To allocate the six results of `semantic_pool` alone takes 0.8 of the time of instance norm, a call of C++. With "
    "gradients, an autograd function of Python that computes nothing takes as long as instance norm where ten tensors "
    "require gradients and there is one result (`semantic_modulate`), and twice as long with six that it saves. "
    "On two threads instance norm takes up to twice as long as on one; beside that on one thread (Intel Xeon, AVX-512) "
    "`semantic_modulate` takes 2.0 to 2.2 and 3.0 to 3.8 times as long, `semantic_pool` 2.4 to 2.7 and 3.5 to 3.8"
)


def _of_operator(operator: str) -> list[Target]:
    """The goals that the operators on feature maps share."""
    large, small = {
        "semantic_modulate": (MODULATE_LARGE, MODULATE_SMALL),
        "semantic_pool": (POOL_LARGE, POOL_SMALL),
    }[operator]
    passes = ((False, "forward"), (True, "forward + backward"))
    of_shapes = [
        Target(
            f"`{operator}`, {where}, {name}",
            rf"{operator}, {re.escape(name)}: {_SHAPES}",
            rows,
            goals[backward],
            reason=reasons[backward],
        )
        for where, rows, goals, reasons in (
            ("64 and 128 channels", _LARGE, large, _WHY_NOT_LARGE[operator]),
            ("64 x 64 and below", _SMALL, small, _WHY_NOT_SMALL[operator]),
        )
        for backward, name in passes
        if backward in goals
    ]
    of_blocks = [
        Target(
            f"the same, 64 channels, label map of blocks, {name}",
            rf"{operator} on label maps, {re.escape(name)}: .*",
            "blocks, 19 labels",
            large[backward],
            reason=_WHY_NOT_BLOCKS[operator][backward],
        )
        for backward, name in passes
        if backward in large
    ]
    return [*of_shapes, *of_blocks]


def _of_modules() -> list[Target]:
    return [
        Target(
            f"whole modulation, {num_labels} labels, {name}",
            rf"Modulation, (simplex|duplex), {re.escape(name)}: k = 8, D = 256, float32; everything counted",
            rf"64 channels, 256 x 256, {num_labels} labels .*",
            module(num_labels, backward),
            reason=_WHY_NOT_MODULE,
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
            Target(f"encoder + generator, {name}, {title}", table, rows, goals, reason=_WHY_NOT_MODEL)
            for title, table, goals in (
                ("inference", inference, beside_published[False]),
                ("inference", inference, _model_beside_compiled(name)),
                ("inference", inference, _model_beside_convolutions(name)),
                ("training step", step, beside_published[True]),
            )
        ]
    return targets


TARGETS = [
    *(
        Target(
            "`semantic_cross_attention`, pixels attend, forward",
            rf"Pixels attend to latents, forward: {_ONE_HEAD}",
            _LINE,
            [goal],
            reason=_WHY_NOT_ATTENTION[goal.numerator],
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
        reason=_WHY_ROWS_COST,
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
    Target(
        "overhead of a tiny call",
        r"(.*, o|O)verhead of a call: .*",
        r"with(out)? gradients",
        OVERHEAD,
        reason=_WHY_OVERHEAD,
    ),
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
