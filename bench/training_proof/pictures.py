"""The pictures of the page: what was there and what models made of it, one column for each of several people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sca_kernels import LatentLayout
from scam_models import Scam
from scam_models.cli.models import write_picture
from scam_models.pictures import grid, label_picture

from .results import TOP, Outcome, TestPictures, divided

COLUMNS = 8
LEVELS = (0, 1)  # of the encoder, whose attention is shown: further ones have too few pixels to see anything
_ENLARGED = 2


def first_of_each(pictures: TestPictures, which: Tensor) -> list[int]:
    """The first picture of each person among those chosen, of at most COLUMNS people: nobody picks the good ones."""
    found: dict[int, int] = {}
    for index in which.nonzero().flatten().tolist():
        found.setdefault(pictures.seeds[index].identity, index)
    return list(found.values())[:COLUMNS]


def write_pictures(folder: Path, pictures: TestPictures, models: dict[int, Scam], outcomes: dict[int, Outcome]) -> None:
    """Writes them.

    Args:
        folder: that gets the files.
        pictures: of the data set.
        models, outcomes: by the number of latents.
    """
    everyone = first_of_each(pictures, torch.ones(len(pictures.images), dtype=torch.bool))
    others = [pictures.others[index] for index in everyone]
    most, least = max(outcomes), min(outcomes)
    _write(
        folder / "reconstructions.png",
        [pictures.images[everyone], *(outcomes[latents].reconstructions[everyone] for latents in (most, least))],
    )
    _write(
        folder / "transfers.png",
        [
            pictures.images[everyone],
            pictures.images[others],
            pictures.truth[everyone],
            *(outcomes[latents].transfers[everyone] for latents in (most, least)),
        ],
    )
    dressed_in_two = first_of_each(pictures, divided(pictures.labels == TOP, pictures.cloths))
    layout = models[most].generator.configuration.layout
    _write(
        folder / "attention.png",
        [
            row
            for images, cloths, strongest in (
                (pictures.images, pictures.cloths, outcomes[most].strongest),
                (pictures.turned, pictures.turned_cloths, outcomes[most].turned_strongest),
            )
            for row in (
                images[dressed_in_two],
                label_picture(cloths[dressed_in_two].int() - 1, 2),
                *(_of_top(strongest[dressed_in_two, plane], layout) for plane in (0, *(1 + level for level in LEVELS))),
            )
        ],
    )


def _of_top(strongest: Tensor, layout: LatentLayout) -> Tensor:
    """Pixels of the label "top" in the colour of their latent, as plainly different as labels are; others grey."""
    begin, end = layout.cu_latents[TOP : TOP + 2]
    is_top = (strongest >= begin) & (strongest < end)
    return label_picture(torch.where(is_top, strongest - begin, -1), end - begin)


def _write(path: Path, rows: Sequence[Tensor]) -> None:
    picture = grid([row.unbind() for row in rows])
    for dimension in (1, 2):
        picture = picture.repeat_interleave(_ENLARGED, dimension)
    write_picture(path, picture)
