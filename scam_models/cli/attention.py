"""``scam attention``: which latents pixels attend to."""

from __future__ import annotations

from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..errors import InputError
from ..pictures import grid, heat_picture, label_picture, strongest_picture
from .models import Checkpoint, ImageFile, Seed, load_model, read_image, write_picture


class Attention(str, Enum):
    """Whose attention is looked at."""

    GENERATOR = "generator"
    ENCODER = "encoder"


def attention(
    checkpoint: Checkpoint,
    image: ImageFile,
    out: Annotated[Path, typer.Option(help="Folder that gets the pictures.", show_default=False)],
    label: Annotated[
        list[str] | None,
        typer.Option(help="Heat maps of this label only, by name or number; may be repeated.", show_default=False),
    ] = None,
    of: Annotated[
        Attention,
        typer.Option(help="generator: how pixels attend to latents; encoder: which latents attend to pixels."),
    ] = Attention.GENERATOR,
    level: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of the encoder: 0, the image itself, or 1, 2, ..., each of half the size. Default: 0.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Write for IMAGE: itself, its label map, its reconstruction and each pixel's strongest latent, beside each other;
    and for each label that occurs in it a row of heat maps, one for each of its latents.

    In the generator pixels attend to latents, and the strongest is the one that a pixel attends to most. In the encoder
    latents attend to pixels, and the strongest is the one from which a pixel gets most."""
    if level is not None and of is Attention.GENERATOR:
        raise InputError("--level: the generator has none; give --of encoder with it")
    trained = load_model(checkpoint)
    shown, labels, name = read_image(image, trained)
    present = labels.labels.unique()
    wanted = [trained.data.label(given) for given in label or ()] or present[present >= 0].tolist()
    absent = [number for number in wanted if number not in present]
    if absent:
        raise InputError(f"{image}: no pixel has label {trained.data.label_name(absent[0])}")
    model = trained.model
    encoder = model.encoder.configuration
    if level is not None and level >= encoder.num_blocks:
        raise InputError(f"--level {level}: expected one from 0 to {encoder.num_blocks - 1}")
    with torch.inference_mode():
        latents = model.encode(shown, labels)
        torch.manual_seed(seed)
        reconstruction = model.generate(labels, latents)
        if of is Attention.ENCODER:
            layout = encoder.layout
            found = model.encoder_attention(shown, labels, level=level or 0).at(labels.height, labels.width)
        else:
            layout = model.generator.configuration.layout
            torch.manual_seed(seed)
            found = model.attention(labels, latents)
    overview = [
        shown,
        label_picture(labels.labels, labels.num_labels),
        reconstruction,
        strongest_picture(found.strongest(), layout),
    ]
    pictures = {f"{name}.png": [picture[0] for picture in overview]}
    spans = list(pairwise(layout.cu_latents))
    for number in wanted:
        heat = [heat_picture(found, layout, latent, shown)[0] for latent in range(*spans[number])]
        if heat:
            pictures[f"{name}-{trained.data.label_name(number)}.png"] = heat
    for file_name, row in pictures.items():
        write_picture(out / file_name, grid([row]))
        print(out / file_name)
