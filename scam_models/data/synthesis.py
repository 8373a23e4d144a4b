"""A procedural data set: people in several poses before several backgrounds, with exact label maps and identities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import FileError, InputError
from .figures import Appearance, Background, Drawing, Pose, draw

IDENTITIES_FILE = "identities.json"
_SEEDS_PER_SPLIT = 1_000_000
# Only for viewers of the label files: background, skin, hair, top, bottom, shoes.
_PALETTE = ((38, 70, 83), (244, 196, 140), (120, 72, 40), (214, 72, 66), (66, 100, 214), (52, 150, 80))


@dataclass(frozen=True)
class FigureSeeds:
    """What a procedural picture shows. With the seeds it can be drawn again, or before the background of another.

    Attributes:
        identity, pose, background: see :class:`scam_models.data.figures.Appearance` and so on.

    Example:
        >>> FigureSeeds(1, 2, 3).draw(64, 48).image.shape
        torch.Size([3, 64, 48])
    """

    identity: int
    pose: int
    background: int

    def draw(self, height: int, width: int) -> Drawing:
        """The picture."""
        return draw(
            Appearance.from_seed(self.identity),
            Pose.from_seed(self.pose),
            Background.from_seed(self.background),
            height,
            width,
        )


def make_data(
    folder: str | PathLike[str],
    *,
    height: int = 64,
    width: int = 64,
    identities: int = 64,
    test_identities: int = 16,
    pictures: int = 8,
    seed: int = 0,
    progress: Callable[[Iterable[FigureSeeds], int], Iterable[FigureSeeds]] = lambda figures, count: figures,
) -> None:
    """Writes a data set of the labels of the preset "tiny": background, skin, hair, top, bottom, shoes.

    Each split gets, beside ``images`` and ``labels``, ``identities.json`` with the seeds of each picture
    (:func:`read_identities`), and ``cloth``: label images that are 1 and 2 where upper clothes show the first and the
    second of two kinds of cloth, which the labels do not tell apart. Nobody is in both splits.

    Args:
        folder: to be made; it may exist if it is empty.
        height, width: of the pictures, from 32 to 1024.
        identities, test_identities: numbers of people in the splits.
        pictures: of each person, each in a pose and before a background of its own.
        seed: the same numbers give the same files.
        progress: wraps what is drawn, given its number.

    Raises:
        InputError: if a number is out of range, or the folder is not empty.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     make_data(folder, height=32, width=32, identities=1, test_identities=1, pictures=2)
        ...     sorted(path.name for path in Path(folder).glob("train/*/*"))
        ['0000-00.png', '0000-00.png', '0000-00.png', '0000-01.png', '0000-01.png', '0000-01.png']
    """
    folder = Path(folder)
    for name, size in (("height", height), ("width", width)):
        if not 32 <= size <= 1024:
            raise InputError(f"{name}: expected 32 to 1024 pixels, got {size}")
    for name, count in (("identities", identities), ("test_identities", test_identities), ("pictures", pictures)):
        if not 1 <= count < _SEEDS_PER_SPLIT // 1000:
            raise InputError(f"{name}: expected 1 to {_SEEDS_PER_SPLIT // 1000 - 1}, got {count}")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty; name a new folder")
    splits = {
        "train": _figures(2 * seed, identities, pictures),
        "test": _figures(2 * seed + 1, test_identities, pictures),
    }
    for split, figures in splits.items():
        place = folder / split
        for kind in ("images", "labels", "cloth"):
            (place / kind).mkdir(parents=True)
        for name, seeds in zip(figures, progress(figures.values(), len(figures)), strict=True):
            drawing = seeds.draw(height, width)
            pixels = (drawing.image.permute(1, 2, 0) * 255).round().to(torch.uint8)
            _to_image("RGB", pixels).save(place / "images" / f"{name}.png")
            labels = _to_image("P", drawing.labels.to(torch.uint8))
            # A shorter palette would be written with less than 8 bits a pixel.
            labels.putpalette([value for colour in _PALETTE for value in colour] + [0] * 3 * (256 - len(_PALETTE)))
            labels.save(place / "labels" / f"{name}.png")
            _to_image("L", drawing.cloth).save(place / "cloth" / f"{name}.png")
        described = {name: asdict(seeds) for name, seeds in figures.items()}
        (place / IDENTITIES_FILE).write_text(json.dumps(described, indent=1) + "\n")


def read_identities(folder: str | PathLike[str], split: str) -> dict[str, FigureSeeds]:
    """What each picture of a procedural data set shows, by its name.

    Raises:
        FileError: if the data set does not say.
    """
    path = Path(folder) / split / IDENTITIES_FILE
    try:
        return {name: FigureSeeds(**seeds) for name, seeds in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        raise FileError(path, "no such file; 'scam make-data' writes it") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(path, "does not name the seeds of each picture; make the data set anew") from error


def _figures(block: int, identities: int, pictures: int) -> dict[str, FigureSeeds]:
    """Names and seeds of a split. No number is used in two splits or for two identities."""
    first = block * _SEEDS_PER_SPLIT
    return {
        f"{identity:04d}-{picture:02d}": FigureSeeds(
            first + identity, first + identity * pictures + picture, first + identity * pictures + picture
        )
        for identity in range(identities)
        for picture in range(pictures)
    }


def _to_image(mode: str, pixels: Tensor) -> Image.Image:
    height, width = pixels.shape[:2]
    return Image.frombytes(mode, (width, height), pixels.contiguous().flatten().numpy().tobytes())
