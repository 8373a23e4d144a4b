"""What is wrong with a data set: every file that cannot be used, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ..errors import FileError, InputError
from .configurations import DataConfiguration
from .dataset import LabelledImages, read_image, read_labels
from .folders import SPLITS, Listing, list_split

_SHOWN = 3  # problems in the message of an error


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used.

    Attributes:
        path: of the file, or of a folder that is not there.
        reason: why not, and what to do.
        split: that it belongs to.
        name: of the sample that it is part of, "" if it is part of none.

    Example:
        >>> print(Problem(Path("train/images/1.png"), "no label map train/labels/1.png", "train", "1"))
        train/images/1.png: no label map train/labels/1.png
    """

    path: Path
    reason: str
    split: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def check(
    folder: str | PathLike[str],
    configuration: DataConfiguration,
    *,
    splits: Sequence[str] = SPLITS,
    progress: Callable[[Iterable[str], int], Iterable[str]] = lambda names, count: names,
) -> list[Problem]:
    """Reads every file of a data set.

    Reported are folders that are not there or empty; files that are no images; images without a label map and label
    maps without an image; several images of one name; files that cannot be read; label maps with colours, with values
    that are no labels, or without any label; and label maps of other proportions than their images. A label map may
    have another resolution.

    Args:
        folder: holds ``split/images`` and ``split/labels``.
        configuration: which values are labels.
        splits: to be checked.
        progress: wraps the names of a split, given their number, while they are read.

    Returns:
        what is wrong, in the order of splits and names; empty if nothing is.

    Raises:
        InputError: if the folder is not there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from scam_models.data import preset
        >>> with TemporaryDirectory() as folder:
        ...     for kind in ("images", "labels"):
        ...         (Path(folder) / "train" / kind).mkdir(parents=True)
        ...     problems = check(folder, preset("tiny"), splits=["train"])
        >>> [problem.reason for problem in problems]
        ['no images; put PNG or JPEG files there']
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; expected one with train/images, train/labels and so on")
    problems: list[Problem] = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for split in splits:
            try:
                listing = list_split(folder, split)
            except FileError as error:
                problems.append(Problem(error.path, error.reason, split))
                continue
            problems += [Problem(path, "neither an image nor a label map; remove it", split) for path in listing.others]
            if not listing.images:
                problems.append(
                    Problem(Path(folder) / split / "images", "no images; put PNG or JPEG files there", split)
                )
            names = sorted(listing.images.keys() | listing.labels.keys())
            found = pool.map(
                lambda name, split=split, listing=listing: _check_sample(split, name, listing, configuration), names
            )
            for _, reported in zip(progress(names, len(names)), found, strict=True):
                problems += reported
    return problems


def open_checked(
    folder: str | PathLike[str],
    split: str,
    configuration: DataConfiguration,
    *,
    skip_problems: bool = False,
    report: Callable[[str], object] = print,
    flip: bool = False,
    random_crop: bool = False,
) -> LabelledImages:
    """A data set all of whose files have been read once.

    Args:
        folder, split, configuration, flip, random_crop: see :class:`LabelledImages`.
        skip_problems: whether to leave out what :func:`check` finds.
        report: is told of each problem that is left out.

    Raises:
        InputError: if there are problems and they are not skipped, or no image is left.
    """
    problems = check(folder, configuration, splits=(split,))
    if problems and not skip_problems:
        shown = "; ".join(map(str, problems[:_SHOWN]))
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            f"{len(problems)} problems in {Path(folder) / split}: {shown}{more}. "
            "'scam check' lists them all; skip such files or correct them"
        )
    for problem in problems:
        report(f"skipped {problem}")
    return LabelledImages(
        folder,
        split,
        configuration,
        flip=flip,
        random_crop=random_crop,
        skip={problem.name for problem in problems if problem.name},
    )


def _check_sample(split: str, name: str, listing: Listing, configuration: DataConfiguration) -> list[Problem]:
    images, labels = listing.images.get(name, []), listing.labels.get(name, [])
    problems = []

    def report(path: Path, reason: str) -> None:
        problems.append(Problem(path, reason, split, name))

    sizes = []
    for path in images:
        try:
            sizes.append(read_image(path).size)
        except FileError as error:
            report(error.path, error.reason)
    for path in images[1:]:
        report(path, f"{images[0].name} has the same name; keep one of them")
    if not labels:
        report(images[0], f"no label map {split}/labels/{name}.png")
    for path in labels:
        if not images:
            report(path, f"no image {split}/images/{name}.png (or .jpg)")
        try:
            read = read_labels(path, configuration)
        except FileError as error:
            report(error.path, error.reason)
            continue
        height, width = read.shape
        if (read < 0).all():
            report(path, "no pixel has a label")
        if sizes and sizes[0][0] * height != sizes[0][1] * width:
            report(path, f"{width} x {height} pixels, its image has {sizes[0][0]} x {sizes[0][1]}")
    return problems
