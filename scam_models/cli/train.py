"""scam train: a model from a folder of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DataFolder, NumLabels, Preset, Size, data_configuration


def train(
    data: DataFolder,
    out: Annotated[Path, typer.Option(help="Folder for last.ckpt, best.ckpt and TensorBoard's files.")],
    preset: Preset = "tiny",
    labels: NumLabels = None,
    size: Size = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from last.ckpt, if it is there.")] = False,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of a step, over all processes.")] = None,
    latents: Annotated[int, typer.Option(help="Latents of each label.")] = 8,
    vgg: Annotated[Path | None, typer.Option(help="torchvision's vgg19 weights, for the perceptual loss.")] = None,
    feature_matching: Annotated[float | None, typer.Option(help="Weight of the feature matching loss.")] = None,
    r1: Annotated[float | None, typer.Option(help="Weight of the R1 penalty.")] = None,
    no: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out a part; may be repeated: encoder-convolutions, self-attention, latent-update, noise, "
            "adversarial, perceptual, l1."
        ),
    ] = None,
    generator_rate: Annotated[float | None, typer.Option(help="Learning rate of encoder and generator.")] = None,
    discriminator_rate: Annotated[float | None, typer.Option(help="Learning rate of the discriminator.")] = None,
    precision: Annotated[str | None, typer.Option(help="32, or bf16 for mixed precision.")] = None,
    gradient_clip: Annotated[float | None, typer.Option(help="Largest norm of the gradients; 0 for any.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    validation_share: Annotated[
        float | None, typer.Option(help="Share of the images that is kept for choosing the best weights.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    devices: Annotated[int | None, typer.Option(help="Number of processes. Default: one for each GPU.")] = None,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu or auto.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that load images, for each that trains.")] = 4,
    report_every: Annotated[int, typer.Option(help="Steps between updates of what is shown.")] = 10,
    skip_problems: Annotated[
        bool, typer.Option("--skip-problems", help="Leave out files that cannot be used, and say which.")
    ] = False,
) -> None:
    """Train a model to reconstruct the images of DATA/train."""
    from ..training import train as run
    from ..training import training_preset, without

    configuration = training_preset(preset, latents=latents, data=data_configuration(preset, labels, size))
    losses: dict[str, Any] = {"feature_matching": feature_matching, "r1": r1}
    options: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "generator_rate": generator_rate,
        "discriminator_rate": discriminator_rate,
        "precision": precision,
        "gradient_clip": gradient_clip,
        "seed": seed,
        "validate_every": validate_every,
        "validation_share": validation_share,
        "checkpoint_every": checkpoint_every,
    }
    configuration = replace(configuration, **_given(options), losses=replace(configuration.losses, **_given(losses)))
    run(
        data,
        without(configuration, no or ()),
        out,
        resume=resume,
        vgg=vgg,
        skip_problems=skip_problems,
        devices="auto" if devices is None else devices,
        accelerator=accelerator,
        workers=workers,
        report_every=report_every,
        report=typer.echo,
    )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
