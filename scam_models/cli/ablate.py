"""``scam ablate``: what each part is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .options import DataFolder, NumLabels, Preset, Size, data_configuration


def ablate(
    data: DataFolder,
    out: Annotated[Path, typer.Option(help="Folder for table.md and the trainings.", show_default=False)],
    preset: Preset = "tiny",
    labels: NumLabels = None,
    size: Size = None,
    steps: Annotated[int | None, typer.Option(help="Of each training.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of each training.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings of each variant.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="Train this variant only, and the whole; may be repeated.")
    ] = None,
    vgg: Annotated[
        Path | None, typer.Option(help="torchvision's vgg19 weights, for the perceptual loss.", show_default=False)
    ] = None,
    fid_weights: Annotated[
        Path | None, typer.Option(help="Inception v3 of pytorch-fid, for S-FID.", show_default="random features")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu or auto.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 4,
) -> None:
    """Train the whole, without each part, and with 4, 8, 16 and 32 latents; write a table. Goes on where it was."""
    from ..evaluation import InceptionFeatures
    from ..training import ablation_table, training_preset, without

    configuration = training_preset(preset, data=data_configuration(preset, labels, size))
    configuration = replace(
        configuration, steps=steps or configuration.steps, batch_size=batch_size or configuration.batch_size
    )
    if vgg is None:
        configuration = without(configuration, ["perceptual"])
        typer.echo("perceptual loss: OFF in all trainings, for it needs the weights of VGG19 (--vgg)")
    chosen = ablation_table.variants(configuration)
    if only:
        unknown = [name for name in only if name not in chosen]
        if unknown:
            raise InputError(f"--only {unknown[0]!r}: expected one of {', '.join(chosen)}")
        chosen = {name: variant for name, variant in chosen.items() if name == "whole" or name in only}
    results = ablation_table.ablate(
        data,
        chosen,
        out,
        seeds=range(seeds),
        fid_features=InceptionFeatures(fid_weights) if fid_weights else None,
        report=typer.echo,
        vgg=vgg,
        devices=1,
        accelerator=accelerator,
        workers=workers,
    )
    typer.echo(ablation_table.table(results))
