"""``scam attention``: which latents pixels attend to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..errors import InputError
from ..pictures import grid, heat_picture, label_picture, strongest_picture
from .models import Checkpoint, ImageFile, Seed, load_model, read_image, write_picture


def attention(
    checkpoint: Checkpoint,
    image: ImageFile,
    out: Annotated[Path, typer.Option(help="Folder that gets the pictures.", show_default=False)],
    label: Annotated[
        list[str] | None,
        typer.Option(help="Heat maps of this label only, by name or number; may be repeated.", show_default=False),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Write for IMAGE: itself, its label map, its reconstruction and each pixel's strongest latent, beside each other;
    and for each label that occurs in it a row of heat maps, one for each of its latents."""
    trained = load_model(checkpoint)
    shown, labels, name = read_image(image, trained)
    present = labels.labels.unique()
    wanted = [trained.data.label(given) for given in label or ()] or present[present >= 0].tolist()
    absent = [number for number in wanted if number not in present]
    if absent:
        raise InputError(f"{image}: no pixel has label {trained.data.label_name(absent[0])}")
    model, layout = trained.model, trained.model.generator.configuration.layout
    with torch.inference_mode():
        latents = model.encode(shown, labels)
        torch.manual_seed(seed)
        reconstruction = model.generate(labels, latents)
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
