"""``scam evaluate``: the metrics of the paper."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..data import LabelledImages, read_identities
from ..data.synthesis import IDENTITIES_FILE
from ..files import write_whole
from .models import Checkpoint, load_model
from .options import DataFolder
from .output import output_console, track


def evaluate(
    checkpoint: Checkpoint,
    data: DataFolder,
    split: Annotated[str, typer.Option(help="Whose images are reconstructed and transferred.")] = "test",
    fid_weights: Annotated[
        Path | None, typer.Option(help="Inception v3 of pytorch-fid, for FID.", show_default="random features")
    ] = None,
    reid_weights: Annotated[
        Path | None,
        typer.Option(help="ResNet-50 that tells people apart, torchvision's names.", show_default="random features"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the pairs of subjects and backgrounds, and of the noise.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Write the figures to this JSON file.", show_default=False)
    ] = None,
) -> None:
    """PSNR, R-FID, S-FID, REID similarity and accuracy of a trained model on DATA."""
    from .. import evaluation

    trained = load_model(checkpoint)
    images = LabelledImages(data, split, trained.data)
    identities = read_identities(data, split) if (data / split / IDENTITIES_FILE).exists() else None

    def progress(batches: Iterable[list[int]], count: int) -> Iterable[list[int]]:
        return track(batches, count, "evaluating")

    result = evaluation.evaluate(
        trained.model,
        images,
        LabelledImages(data, "train", trained.data),
        fid_features=evaluation.InceptionFeatures(fid_weights) if fid_weights else None,
        reid_features=evaluation.ReidentificationFeatures(reid_weights) if reid_weights else None,
        groups=[identities[name].identity for name in images.names] if identities else None,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    table = Table("metric", "value", "computed with", box=None, pad_edge=False)
    for row in result.rows():
        table.add_row(*row)
    output_console().print(table)
    if output is not None:
        content = json.dumps(asdict(result), indent=1) + "\n"
        write_whole(output, lambda file: file.write(content.encode()))
