"""``scam reconstruct``: images from their own latents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..psnr import psnr
from .models import Checkpoint, Seed, load_model, read_image, write_picture


def reconstruct(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(help="Files in DATA/SPLIT/images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder that gets a picture of each name.", show_default=False)],
    seed: Seed = 0,
) -> None:
    """Reconstruct IMAGES, whose label maps are in the folder labels beside them."""
    trained = load_model(checkpoint)
    for path in images:
        image, labels, name = read_image(path, trained)
        torch.manual_seed(seed)
        with torch.inference_mode():
            reconstruction = trained.model.reconstruct(image, labels)
        picture = out / f"{name}.png"
        write_picture(picture, reconstruction[0])
        print(f"{picture}: {psnr(reconstruction, image).item():.2f} dB")
