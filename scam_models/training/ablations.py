"""What a model or its training can do without, one change each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .configuration import TrainingConfiguration


def _encoder_with(**changes: Any) -> Callable[[TrainingConfiguration], TrainingConfiguration]:
    def change(configuration: TrainingConfiguration) -> TrainingConfiguration:
        model = configuration.model
        return replace(configuration, model=replace(model, encoder=replace(model.encoder, **changes)))

    return change


def _generator_with(**changes: Any) -> Callable[[TrainingConfiguration], TrainingConfiguration]:
    def change(configuration: TrainingConfiguration) -> TrainingConfiguration:
        model = configuration.model
        return replace(configuration, model=replace(model, generator=replace(model.generator, **changes)))

    return change


def _without_loss(name: str) -> Callable[[TrainingConfiguration], TrainingConfiguration]:
    def change(configuration: TrainingConfiguration) -> TrainingConfiguration:
        return replace(configuration, losses=replace(configuration.losses, **{name: 0.0}))

    return change


ABLATIONS: Mapping[str, Callable[[TrainingConfiguration], TrainingConfiguration]] = {
    "encoder-convolutions": _encoder_with(pyramid=False),
    "self-attention": _encoder_with(self_attention=False),
    "latent-update": _generator_with(duplex=False),
    "noise": _generator_with(noise=False),
    "adversarial": _without_loss("adversarial"),
    "perceptual": _without_loss("perceptual"),
    "l1": _without_loss("l1"),
    "feature-matching": _without_loss("feature_matching"),
    "r1": _without_loss("r1"),
}


def without(configuration: TrainingConfiguration, parts: Iterable[str]) -> TrainingConfiguration:
    """The configuration without parts.

    Args:
        configuration: of the whole.
        parts: "encoder-convolutions": the encoder's blocks all attend to the image itself. "self-attention": latents of
            the encoder do not attend to each other. "latent-update": latents do not attend to the generator's features,
            which the paper calls simplex. "noise": the generator adds none. "adversarial", "perceptual", "l1",
            "feature-matching", "r1": the losses.

    Raises:
        InputError: if there is no such part, or no loss is left.

    Example:
        >>> from scam_models.training import training_preset
        >>> without(training_preset("idesigner"), ["latent-update"]).model.generator.duplex
        False
    """
    for part in parts:
        if part not in ABLATIONS:
            raise InputError(f"without {part!r}: expected one of {', '.join(ABLATIONS)}")
        configuration = ABLATIONS[part](configuration)
    return configuration
