"""Which recorded tables the report draws, in which order, and what it says about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .recorded import Recorded


@dataclass(frozen=True)
class Panel:
    """A part of a picture.

    Attributes:
        title: of the part.
        table, rows: regular expressions for whole titles of tables and whole names of rows.
        copies: what must be moved at least, in copies of the feature map; for shares of the floor.
        ours, floor: contenders of which a share is shown.
    """

    title: str
    table: str
    rows: str = ".*"
    copies: float = 1.0
    ours: str = "ours"
    floor: str = "copy"

    def covers(self, comparison: Recorded) -> bool:
        """Whether it is drawn here."""
        return bool(re.fullmatch(self.table, comparison.table) and re.fullmatch(self.rows, comparison.row))


@dataclass(frozen=True)
class Chart:
    """A picture and the words above it.

    Attributes:
        name: of its file.
        title: the heading.
        text: what it shows.
        kind: "ratios" to the first contender, "values" themselves, "floor" in percent, "growth" over the numbers that
            the rows are named by, or "parts" of a whole.
        panels: what is drawn.
        axis: what is along the axis of growth.
        left_out: contenders that are not drawn; the tables have them.
    """

    name: str
    title: str
    text: str
    kind: Literal["ratios", "values", "floor", "growth", "parts"]
    panels: Sequence[Panel]
    axis: str = ""
    left_out: Sequence[str] = ()


PASSES = ("forward", "forward + backward")
OTHER = "other operators"  # of a model, where its time is taken apart
_ESCAPED = {name: name.replace("+", r"\+") for name in PASSES}
_RATIO = "Bars: the time of each as a multiple of ours in the same run, so above 1 (the dashed line) ours is faster."
_FIRST = r"(64 channels, 256 x 256|128 channels, 128 x 128|512 channels, 32 x 32).*"


def _by_pass(table: str, rows: str = ".*") -> list[Panel]:
    """One panel for each pass; ``{}`` in the table stands for its name."""
    return [Panel(name, table.replace("{}", _ESCAPED[name]), rows) for name in PASSES]


def _feature_maps(operator: str) -> list[Chart]:
    orders = (("NCHW, float32", "nchw"), ("channels last, float32", "channels-last"))
    return [
        Chart(
            f"{operator}-label-maps".replace("_", "-"),
            f"`{operator}` on label maps",
            f"64 channels, 256 x 256, 8 latents per label. {_RATIO} `ours + plan` makes the plan of a new label map in "
            "every call. `random` is the worst case: every pixel has a random label.",
            "ratios",
            _by_pass(rf"{operator} on label maps, {{}}: .*float32"),
            left_out=("instance_norm", "autocast"),
        ),
        *(
            Chart(
                f"{operator}-{slug}".replace("_", "-"),
                f"`{operator}` beside instance norm, {order}",
                f"The shapes of the published models, regions of 19 labels, 8 latents each. {_RATIO} Instance norm "
                "does a part of the work only.",
                "ratios",
                _by_pass(rf"{operator}, {{}}: k = 8, {order}, regions of 19 labels"),
                left_out=("copy",),
            )
            for order, slug in orders
        ),
    ]


def _growth(what: str, axis: str, text: str) -> list[Chart]:
    return [
        Chart(
            f"growth-{what}-{operator.replace('_', '-')}",
            f"Growth with {what}, `{operator}`",
            text,
            "growth",
            _by_pass(rf"Growth with {what}, {operator}, {{}}: .*"),
            axis=axis,
        )
        for operator in ("semantic_cross_attention", "semantic_modulate", "semantic_pool")
    ]


CHARTS = [
    Chart(
        "cross-attention",
        "`semantic_cross_attention`, pixels attend to latents",
        f"65,536 pixels, 8 latents per label, width 256. {_RATIO} `copy`, of the query, is the least that "
        "must be moved.",
        "ratios",
        _by_pass(r"Pixels attend to latents, {}: k = 8, D = 256, H = 1, float32", r"65,536 pixels, \d+ labels"),
    ),
    Chart(
        "cross-attention-bfloat16",
        "`semantic_cross_attention` in bfloat16",
        f"The same in bfloat16. {_RATIO}",
        "ratios",
        _by_pass(r"Pixels attend to latents, {}: k = 8, D = 256, H = 1, bfloat16"),
    ),
    Chart(
        "cross-attention-noise",
        "`semantic_cross_attention`, every pixel its own random label",
        f"The worst label map there is. {_RATIO}",
        "ratios",
        _by_pass(r"Every pixel its own random label, {}: .*float32"),
    ),
    Chart(
        "cross-attention-label-maps",
        "`semantic_cross_attention` on label maps",
        "65,536 pixels, 19 labels (photographs: 3) of 8 latents, plan counted, beside the dense formulation, which "
        "takes equally long for any map.",
        "values",
        [Panel("", r"Label maps: .*")],
    ),
    *_feature_maps("semantic_modulate"),
    *_feature_maps("semantic_pool"),
    Chart(
        "instance-modulate",
        "`instance_modulate` with maps of gamma and beta",
        f"Noise and leaky ReLU included, NCHW, float32. {_RATIO}",
        "ratios",
        _by_pass(r"instance_modulate, {}: maps of gamma and beta, noise per pixel, leaky ReLU, NCHW, float32", _FIRST),
        left_out=("copy",),
    ),
    *(
        Chart(
            f"modulation-{kind}",
            f"A whole modulation, {kind}",
            f"Label map, plan, folding and the update of the latents are all counted; float32. {_RATIO} "
            "`ours, all labels`: on a map in which all labels occur.",
            "ratios",
            _by_pass(rf"Modulation, {kind}, {{}}: k = 8, D = 256, float32; everything counted", _FIRST),
        )
        for kind in ("simplex", "duplex")
    ),
    Chart(
        "models",
        "Encoder and generator",
        f"The published configurations, float32. {_RATIO} `convolutions` are those of the networks and nothing else.",
        "ratios",
        [
            Panel(name, rf"Encoder \+ generator, {name}: k = 8, float32", r".*batch 1, .*")
            for name in ("inference", "training step")
        ],
    ),
    Chart(
        "swapped",
        "Published models with our kernels swapped in",
        f"What `sca_kernels.swap_in` makes of a published model. {_RATIO}",
        "ratios",
        [
            Panel(name, rf"Published encoder \+ generator, swapped, {name}: .*")
            for name in ("inference", "training step")
        ],
    ),
    Chart(
        "layers",
        "The attention layers of a model, one by one",
        f"CelebAMask-HQ, one training step, float32, each layer with what it gets in the model. {_RATIO} Convolutions "
        "are the same before and after and not shown; ADE20K is in the tables.",
        "ratios",
        [
            Panel(part, r"Layer by layer, training step: CelebAMask-HQ.*", rf"{part}\..*")
            for part in ("encoder", "generator")
        ],
    ),
    Chart(
        "breakdown",
        "Where the time of a model goes",
        "By PyTorch's profiler, before (published) and after (ours). The profiler makes a run a few percent slower. "
        f"Parts that are small everywhere are among the {OTHER}; docs/profile.md has them.",
        "parts",
        [Panel(name, rf"Where the time goes, {name}: .*") for name in ("inference", "training step")],
    ),
    *_growth(
        "pixels",
        "pixels",
        "19 labels of 8 latents, on a logarithmic scale: a straight line with the slope of the dense one is linear in "
        "the pixels. The dense curve ends where its tables of all pairs no longer fit into memory.",
    ),
    *_growth(
        "labels",
        "labels",
        "16,384 pixels, 8 latents per label, regions in which all labels occur.",
    ),
    *_growth("latents", "latents per label", "16,384 pixels, 19 labels."),
    Chart(
        "memory",
        "Peak memory",
        "Forward + backward, counted at PyTorch's allocator. `inputs and results` must be there in any case.",
        "values",
        [
            Panel("semantic_cross_attention", r"Peak memory of forward \+ backward: .*"),
            Panel("semantic_modulate", r"semantic_modulate, peak memory .*"),
            Panel("semantic_pool", r"semantic_pool, peak memory .*"),
            Panel("instance_modulate", r"instance_modulate, peak memory .*"),
        ],
    ),
    Chart(
        "memory-models",
        "Peak memory of a model",
        "Parameters and inputs were there before and are not counted, gradients are.",
        "values",
        [
            Panel("training step", r"Encoder \+ generator, peak memory .*"),
            Panel("swapped in", r"Published encoder \+ generator, swapped, peak memory of .*"),
        ],
    ),
    Chart(
        "floor",
        "Share of the floor",
        "How much of our time the least that can be done takes: moving the bytes of the feature map once through "
        "memory (from the copy in the same run), or a model's convolutions. 100% cannot be beaten.",
        "floor",
        [
            Panel(
                "semantic_cross_attention, forward",
                r"Pixels attend to latents, forward: k = 8, D = 256, H = 1, float32",
                r"65,536 pixels, \d+ labels",
            ),
            *(
                Panel(f"{operator}, {name}, {order}", rf"{operator}, {_ESCAPED[name]}: {table}", _FIRST, copies)
                for operator, of_passes in (("semantic_modulate", (1.5, 4.0)), ("semantic_pool", (0.5, 1.5)))
                for name, copies in zip(PASSES, of_passes, strict=True)
                for order in ("NCHW", "channels last")
                for table in (rf"k = 8, {order}, float32, regions of 19 labels",)
            ),
            Panel(
                "instance_modulate with maps of gamma and beta, forward, NCHW",
                r"instance_modulate, forward: maps of gamma and beta, noise per pixel, leaky ReLU, NCHW, float32",
                _FIRST,
                copies=2.5,
            ),
            *(
                Panel(
                    f"encoder + generator, {name}",
                    rf"Encoder \+ generator, {name}: k = 8, float32",
                    r".*batch 1, .*",
                    floor="convolutions",
                )
                for name in ("inference", "training step")
            ),
        ],
    ),
    Chart(
        "threads",
        "Threads",
        _RATIO,
        "ratios",
        [
            Panel("semantic_cross_attention", r"Threads, 65,536 pixels, .*"),
            *(
                Panel(name, rf"Threads, {name}, .*")
                for name in ("semantic_modulate", "semantic_pool", "instance_modulate", "modulation")
            ),
        ],
        left_out=("copy",),
    ),
    Chart(
        "overhead",
        "Overhead of a call",
        "A call on 4 x 4 pixels, where only the way to the kernel counts, beside `torch.nn.functional.instance_norm`.",
        "values",
        [
            Panel("semantic_cross_attention", r"Overhead of a call: .*"),
            *(
                Panel(operator, rf"{operator}, overhead of a call: .*")
                for operator in ("semantic_modulate", "semantic_pool", "instance_modulate")
            ),
        ],
    ),
]

# Why a way to compute the same is in no table.
NOT_RUN = {
    "FlashAttention, variable lengths (`flash_attn_varlen_func`)": "only exists on a GPU",
    "xFormers with a block-diagonal mask": "only exists on a GPU",
}
