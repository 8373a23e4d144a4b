"""``scam transfer``: an image with labels as other images show them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from sca_kernels import LabelMap

from ..errors import InputError
from .models import Checkpoint, Seed, load_model, read_image, write_picture


def transfer(
    checkpoint: Checkpoint,
    subject: Annotated[Path, typer.Option(help="Image in DATA/SPLIT/images; its map is used.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Picture to write.", show_default=False)],
    background: Annotated[
        Path | None, typer.Option(help="Image that the background comes from.", show_default=False)
    ] = None,
    take: Annotated[
        list[str] | None,
        typer.Option(help="LABEL=IMAGE: a label as another image shows it, by name or number; may be repeated."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Put a subject before another background, or give it the hair of a third: latents of labels from other images."""
    trained = load_model(checkpoint)
    paths = {} if background is None else dict.fromkeys(trained.data.background, background)
    for given in take or ():
        name, equals, source = given.partition("=")
        if not equals or not source:
            raise InputError(f"--take {given}: expected LABEL=IMAGE, such as hair=data/test/images/grace.png")
        paths[trained.data.label(name)] = Path(source)
    if not paths:
        raise InputError("nothing to transfer: give --background IMAGE or --take LABEL=IMAGE")
    sources: dict[Path, tuple[Tensor, LabelMap]] = {}
    for path in paths.values():
        if path not in sources:
            image, labels, _ = read_image(path, trained)
            sources[path] = (image, labels)
    image, labels, _ = read_image(subject, trained)
    torch.manual_seed(seed)
    with torch.inference_mode():
        result = trained.model.transfer(image, labels, {label: sources[path] for label, path in paths.items()})
    write_picture(out, result[0])
    print(out)
