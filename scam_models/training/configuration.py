"""What is trained, on what and how; the presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from sca_kernels import LatentLayout

from ..configurations import ScamConfiguration, ade20k, celebamask_hq, check_positive, idesigner, tiny
from ..data import DataConfiguration, preset
from ..discriminator import DiscriminatorConfiguration
from ..errors import InputError
from ..losses import LossWeights


@dataclass(frozen=True, kw_only=True)
class TrainingConfiguration:
    """What is trained, on what and how. The defaults are those of the paper; it says nothing of averaged weights.

    Attributes:
        model: encoder and generator.
        data: size and labels of the images.
        discriminator: is trained against them.
        losses: their weights.
        steps: number of steps; in each the generator with the encoder learns, and then the discriminator.
        batch_size: images of a step, over all processes.
        generator_rate, discriminator_rate: of AdamW, for encoder and generator together and for the discriminator.
        betas: of AdamW.
        weight_decay: of AdamW.
        average_decay: how much of the averaged weights stays in each step. In step t it is at most (1 + t) / (10 + t).
        gradient_clip: largest norm of the gradients of either optimiser; 0 for any, as published.
        r1_every: steps between those in which :func:`scam_models.r1_penalty` is asked for, if it has a weight.
        precision: "32", or "bf16" for autocast to bfloat16.
        seed: of the weights, of the order of images, of their augmentation and of the noise.
        validation_share: of the images of "train", which are kept apart for choosing the best weights. At least one is
            unless it is 0.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.

    Raises:
        InputError: if a number is out of range, or parts do not fit together.

    Example:
        >>> configuration = training_preset("idesigner")
        >>> configuration.generator_rate, configuration.losses.perceptual, configuration.model.generator.width
        (0.0001, 10.0, 170)
    """

    model: ScamConfiguration
    data: DataConfiguration
    discriminator: DiscriminatorConfiguration
    losses: LossWeights = field(default_factory=LossWeights)
    steps: int = 50_000
    batch_size: int = 32
    generator_rate: float = 1e-4
    discriminator_rate: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    average_decay: float = 0.999
    gradient_clip: float = 0.0
    r1_every: int = 16
    precision: Literal["32", "bf16"] = "32"
    seed: int = 0
    validation_share: float = 0.02
    validate_every: int = 1000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        try:
            check_positive(self, "steps", "batch_size", "r1_every", "validate_every", "checkpoint_every")
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.precision not in ("32", "bf16"):
            raise InputError(f"precision: expected '32' or 'bf16', got {self.precision!r}")
        for name, least, most in (("average_decay", 0, 1), ("validation_share", 0, 0.5)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name}: expected a number from {least} to {most}, got {getattr(self, name)}")
        for name in ("generator_rate", "discriminator_rate", "weight_decay", "gradient_clip"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        losses = self.losses
        if not any((losses.adversarial, losses.perceptual, losses.l1, losses.feature_matching)):
            raise InputError("losses: expected a loss for the generator, got weights of 0 for all")
        generator, data = self.model.generator, self.data
        if (generator.height, generator.width) != (data.height, data.width):
            raise InputError(
                f"data: expected images of {generator.height} x {generator.width} pixels, those of the generator, "
                f"got {data.height} x {data.width}"
            )
        for name, num_labels in (
            ("model", generator.layout.num_labels),
            ("discriminator", self.discriminator.num_labels),
        ):
            if num_labels != data.num_labels:
                raise InputError(f"{name}: expected {data.num_labels} labels, those of the data, got {num_labels}")


# What may be different when training goes on from a checkpoint.
MAY_CHANGE = frozenset({"steps", "validate_every", "checkpoint_every"})

_MODELS: dict[str, Callable[[], ScamConfiguration]] = {
    "idesigner": idesigner,
    "celebamask-hq": celebamask_hq,
    "ade20k": ade20k,
}


def training_preset(name: str, *, latents: int = 8, data: DataConfiguration | None = None) -> TrainingConfiguration:
    """How a data set is trained: "idesigner", "celebamask-hq" or "ade20k" as in the paper, "tiny" in minutes on a CPU.

    Args:
        name: of the data set.
        latents: of each label.
        data: where size or labels are not those of the data set.

    Raises:
        InputError: if there is no such preset, ``latents`` is not positive, or images are too small.

    Example:
        >>> training_preset("ade20k", latents=4).model.generator.layout.count
        604
    """
    data = preset(name) if data is None else data
    published = _MODELS.get(name, tiny)()
    try:
        model = ScamConfiguration(
            replace(published.encoder, layout=LatentLayout.uniform(data.num_labels, 1)),
            replace(
                published.generator,
                layout=LatentLayout.uniform(data.num_labels, 1),
                height=data.height,
                width=data.width,
            ),
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    discriminator = DiscriminatorConfiguration(num_labels=data.num_labels)
    if name in _MODELS:
        configuration = TrainingConfiguration(model=model, data=data, discriminator=discriminator)
    else:
        configuration = TrainingConfiguration(
            model=model,
            data=data,
            discriminator=replace(discriminator, first_channels=16),
            steps=2000,
            batch_size=8,
            generator_rate=2e-3,
            discriminator_rate=1e-3,
            average_decay=0.99,
            validate_every=200,
            checkpoint_every=100,
        )
    return with_latents(configuration, latents)


def with_latents(configuration: TrainingConfiguration, latents: int) -> TrainingConfiguration:
    """The same with another number of latents for each label.

    Raises:
        InputError: if ``latents`` is not positive.

    Example:
        >>> with_latents(training_preset("idesigner"), 32).model.encoder.layout.count
        96
    """
    if latents < 1:
        raise InputError(f"latents: expected a positive number, got {latents}")
    model = configuration.model
    layout = LatentLayout.uniform(configuration.data.num_labels, latents)
    changed = ScamConfiguration(replace(model.encoder, layout=layout), replace(model.generator, layout=layout))
    return replace(configuration, model=changed)
