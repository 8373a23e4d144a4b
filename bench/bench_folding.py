"""Whether attention between pixels and latents is computed in the fastest way, at every shape of the published models.

``chosen`` is what :func:`sca_kernels.folding.choose` takes, ``folded`` and ``projected`` are what it takes if it must
fold the projections onto the latents, or project the pixels. Forward is inference, where products of weights are
remembered; backward gives the gradients of features, latents and all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

from sca_kernels import LabelMap, LatentLayout
from sca_kernels.folding import (
    AttentionProjections,
    Choice,
    FoldingCache,
    Projection,
    latents_attend_to_pixels,
    modulate_by_latents,
)
from sca_kernels.nn import sinusoidal_encoding

from . import label_maps, timing
from .feature_maps import NEGATIVE_SLOPE, noticeable, without_gradient_at_kinks
from .published import ATTENTION_WIDTH, STYLE_WIDTH, MaskedAttention
from .races import PASSES
from .report import Goal
from .run import Run
from .timing import Contender

LATENTS = 8
IMAGE_POSITION = 40  # channels of the position that is concatenated to the raw image

SQUARE = [(4 << level, 4 << level) for level in range(7)]
PORTRAIT = [(3, 2), (6, 4), (12, 8), (24, 16), (48, 32), (96, 64), (256, 170)]
GENERATOR_CHANNELS = (1024, 1024, 1024, 512, 256, 128, 64)
SQUARE_PYRAMID = SQUARE[::-1]
PORTRAIT_PYRAMID = [(256, 170), (128, 85), (64, 43), (32, 22), (16, 11), (8, 6), (4, 3)]
ENCODER_CHANNELS = (3, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Configuration:
    """A published configuration.

    Attributes:
        name: of the data set and its label map.
        num_labels: number of labels.
        labels_of: makes the label map, that of the whole image.
        generator, encoder: heights and widths, in the order of the channels above.
    """

    name: str
    num_labels: int
    labels_of: Callable[[int, int, int], Tensor]
    generator: Sequence[tuple[int, int]]
    encoder: Sequence[tuple[int, int]]

    def __str__(self) -> str:
        return self.name

    @cached_property
    def label_map(self) -> LabelMap:
        return LabelMap(self.labels_of(*self.generator[-1], self.num_labels), self.num_labels)

    @property
    def layers(self) -> list[tuple[str, int, tuple[int, int]]]:
        """What is computed, with how many channels, at which height and width."""
        blocks = list(zip(GENERATOR_CHANNELS, self.generator, strict=True))
        levels = list(zip(ENCODER_CHANNELS, self.encoder, strict=True))
        return [
            *(("modulate", *block) for block in blocks),
            *(("pool", *block) for block in blocks),
            *(("encode", *level) for level in levels),
        ]


CONFIGURATIONS = [
    Configuration("CelebAMask-HQ", 19, label_maps.parts, SQUARE, SQUARE_PYRAMID),
    Configuration("ADE20K", 151, label_maps.parts, SQUARE, SQUARE_PYRAMID),
    Configuration("ADE20K, all labels present", 151, label_maps.regions, SQUARE, SQUARE_PYRAMID),
    Configuration("iDesigner", 3, label_maps.photograph, PORTRAIT, PORTRAIT_PYRAMID),
]
LAYERS = [(configuration, *layer) for configuration in CONFIGURATIONS for layer in configuration.layers]
WHAT = {"modulate": "pixels attend, modulation", "pool": "latents attend", "encode": "latents attend, encoder"}


class Layer(nn.Module):
    """The weights of one layer, and its computation in a given way."""

    def __init__(self, what: str, channels: int, size: tuple[int, int], configuration: Configuration) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.encoded = IMAGE_POSITION if channels == 3 else channels
        source = channels + IMAGE_POSITION if channels == 3 else channels
        if what == "modulate":
            self.attention = MaskedAttention(channels, STYLE_WIDTH, ATTENTION_WIDTH, 1)
            self.gamma, self.beta = nn.Linear(channels, channels), nn.Linear(channels, channels)
            self.noise_strength = nn.Parameter(torch.randn(channels))
        else:
            self.attention = MaskedAttention(STYLE_WIDTH, source, ATTENTION_WIDTH, 1)
        self.layout = LatentLayout.uniform(configuration.num_labels, LATENTS)
        self.labels = configuration.label_map.at(*size)
        self.x = nn.Parameter(torch.randn(1, channels, *size))
        self.latents = nn.Parameter(torch.randn(1, self.layout.count, STYLE_WIDTH))
        self.register_buffer("noise", torch.randn(1, 1, *size))
        self.cache = FoldingCache()

    @property
    def shape(self) -> dict[str, int]:
        """What a result is recorded with."""
        return {
            "channels": self.x.shape[1],
            "height": self.x.shape[2],
            "width": self.x.shape[3],
            "latents_per_label": LATENTS,
            "labels": self.layout.num_labels,
            "labels_present": int(torch.unique(self.labels.labels).numel()),
        }

    def forward(self, choice: Choice, cache: FoldingCache | None) -> Tensor:
        height, width = self.x.shape[2:]
        concatenated = self.encoded != self.x.shape[1]
        encoding = sinusoidal_encoding(height, width, self.encoded, concatenated=concatenated, dtype=self.x.dtype)
        # The published keys come from v_linear.
        attention = AttentionProjections(
            *(
                Projection(linear.weight, linear.bias)
                for linear in (
                    self.attention.q_linear,
                    self.attention.v_linear,
                    self.attention.k_linear,
                    self.attention.out[0],
                )
            )
        )
        if self.what != "modulate":
            attended = latents_attend_to_pixels(
                self.latents,
                self.x,
                self.layout,
                self.labels,
                attention,
                encoding=encoding,
                choice=choice,
                cache=cache,
            )
            return attended.out
        return modulate_by_latents(
            self.x,
            self.latents,
            self.layout,
            self.labels,
            attention,
            Projection(self.gamma.weight, self.gamma.bias),
            Projection(self.beta.weight, self.beta.bias),
            encoding=encoding,
            noise=self.noise,
            noise_strength=self.noise_strength,
            negative_slope=NEGATIVE_SLOPE,
            choice=choice,
            cache=cache,
        )

    def task(
        self, choice: Choice, gradient: Tensor | None, compared: Sequence[int] = ()
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A function that computes the result, with a gradient to start from also those of all parameters.

        Of these it returns the ``compared`` ones.
        """

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self(choice, self.cache),)

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = self(choice, None)
            gradients = torch.autograd.grad(out, parameters, gradient)
            return out.detach(), *(gradients[index] for index in compared)

        parameters = list(self.parameters())
        return forward if gradient is None else forward_and_backward


@pytest.mark.parametrize("configuration, what, channels, size", LAYERS, ids=str)
def test_choice(run: Run, configuration: Configuration, what: str, channels: int, size: tuple[int, int]) -> None:
    size, channels = _scaled(run, size, channels)
    layer = Layer(what, channels, size, configuration)
    exact = Layer(what, channels, size, configuration).double()
    out = exact("projected", None)
    gradient = torch.randn(out.shape)
    if what == "modulate":
        without_gradient_at_kinks(gradient, out)
    gradients = torch.autograd.grad(out, list(exact.parameters()), gradient.double())
    compared = noticeable(gradients)
    expected = (out.detach(), *(gradients[index] for index in compared))
    ways: dict[str, Choice] = {"chosen": "auto", "folded": "folded", "projected": "projected"}
    for backward, name in PASSES.items():
        contenders = [
            Contender(
                way,
                layer.task(choice, gradient if backward else None, compared),
                expected if backward else expected[:1],
                layer.shape,
            )
            for way, choice in ways.items()
        ]
        figures = timing.compare(contenders, timing.TOLERANCE[torch.float32], timing.Pace(0.2) if run.full else None)
        timed = [figure for figure in figures[1:] if figure.median is not None]
        best = min(timed, key=lambda figure: figure.median or 0.0, default=None)
        run.record(
            figures,
            table=f"The choice, {WHAT[what]}, {name}: k = {LATENTS}, D = {ATTENTION_WIDTH}, float32",
            row=f"{configuration}, {channels} channels, {size[0]} x {size[1]}",
            goals=() if best is None else (Goal("chosen", best.name, at_most=1.1),),
        )


def _scaled(run: Run, size: tuple[int, int], channels: int) -> tuple[tuple[int, int], int]:
    height, width = size
    small = (max(2, height // 16), max(2, width // 16)), min(channels, 40)
    return run.choose(small, (size, channels))
