"""``scam make-data``: a procedural data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ..data.synthesis import FigureSeeds
from ..data.synthesis import make_data as write_data
from .options import parse_size
from .output import track


def make_data(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="To be made.", show_default=False)],
    size: Annotated[str, typer.Option(help="Height x width of the pictures: 128x96, or 128 for both.")] = "64",
    identities: Annotated[int, typer.Option(help="Number of people to train on.")] = 64,
    test_identities: Annotated[int, typer.Option(help="Number of people to test on, all others.")] = 16,
    pictures: Annotated[int, typer.Option(help="Number of pictures of each person.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
) -> None:
    """Draw a data set of clothed people before textured backgrounds, with label maps: preset tiny, in any size."""
    height, width = parse_size(size)

    def progress(figures: Iterable[FigureSeeds], count: int) -> Iterable[FigureSeeds]:
        return track(figures, count, "drawing")

    write_data(
        folder,
        height=height,
        width=width,
        identities=identities,
        test_identities=test_identities,
        pictures=pictures,
        seed=seed,
        progress=progress,
    )
    print(f"{folder}: {identities * pictures} pictures to train on, {test_identities * pictures} to test on")
