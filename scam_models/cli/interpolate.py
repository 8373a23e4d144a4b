"""``scam interpolate``: what lies between two images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..pictures import grid
from .models import Checkpoint, ImageFile, Seed, load_model, read_image, write_picture


def interpolate(
    checkpoint: Checkpoint,
    image: ImageFile,
    other: Annotated[Path, typer.Argument(help="File in DATA/SPLIT/images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Picture to write.", show_default=False)],
    steps: Annotated[int, typer.Option(min=2, help="Number of images between the two, these included.")] = 7,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Change the latents of this label only, by name or number; may be repeated."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Write IMAGE, a strip of images on the way from its latents to those of OTHER, in IMAGE's label map, and OTHER."""
    trained = load_model(checkpoint)
    only = [trained.data.label(given) for given in label] if label else None
    begin, labels, _ = read_image(image, trained)
    end, end_labels, _ = read_image(other, trained)
    torch.manual_seed(seed)
    with torch.inference_mode():
        strip = trained.model.interpolate(begin, labels, end, end_labels, steps=steps, only=only)
    write_picture(out, grid([[begin[0], *strip, end[0]]]))
    print(out)
