"""Which files belong together: ``{train,test}/{images,labels}``, an image and its label map by one name."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ..errors import FileError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABEL_SUFFIXES = (".png",)
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Listing:
    """The files of one split, by name in order.

    Attributes:
        images, labels: the files of each name, usually one.
        others: files that are neither.
    """

    images: dict[str, list[Path]]
    labels: dict[str, list[Path]]
    others: list[Path]


def list_split(folder: str | PathLike[str], split: str) -> Listing:
    """The files of a split. Hidden files do not count.

    Args:
        folder: of the data set.
        split: "train" or "test", or the name of another folder.

    Raises:
        FileError: if ``split/images`` or ``split/labels`` is not there.
    """
    others: list[Path] = []
    found: list[dict[str, list[Path]]] = []
    for kind, suffixes in (("images", IMAGE_SUFFIXES), ("labels", LABEL_SUFFIXES)):
        place = Path(folder) / split / kind
        if not place.is_dir():
            raise FileError(place, f"no such folder; a data set has {split}/images and {split}/labels")
        by_name: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                continue
            if path.suffix.lower() in suffixes and path.is_file():
                by_name.setdefault(path.stem, []).append(path)
            else:
                others.append(path)
        found.append(by_name)
    images, labels = found
    return Listing(images, labels, others)
