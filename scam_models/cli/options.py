"""Options that several commands have."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..data import PRESETS, DataConfiguration, preset
from ..errors import InputError

DataFolder = Annotated[
    Path, typer.Argument(metavar="DATA", help="Folder with {train,test}/{images,labels}.", show_default=False)
]
Preset = Annotated[str, typer.Option("--preset", help=f"Which data set it is: {', '.join(PRESETS)}.")]
NumLabels = Annotated[
    int | None,
    typer.Option("--labels", min=1, help="Number of labels, if other than the preset's.", show_default=False),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", help="Height x width of the images, if other than the preset's: 128x96, or 128.", show_default=False
    ),
]


def data_configuration(name: str, num_labels: int | None = None, size: str | None = None) -> DataConfiguration:
    """The preset of a name with what the options change.

    Raises:
        InputError: if there is no such preset or the size is none.

    Example:
        >>> data_configuration("tiny", size="128x96").width
        96
    """
    configuration = preset(name)
    if num_labels is not None and num_labels != configuration.num_labels:
        # Names and merging are those of the preset's labels.
        configuration = replace(configuration, num_labels=num_labels, label_names=(), merging=None, flip=False)
    if size is not None:
        height, width = parse_size(size)
        configuration = replace(configuration, height=height, width=width)
    return configuration


def parse_size(size: str) -> tuple[int, int]:
    """Height and width of "128x96", or "128" for both.

    Raises:
        InputError: if it is neither.

    Example:
        >>> parse_size("64")
        (64, 64)
    """
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", size)
    if match is None:
        raise InputError(f"--size {size}: expected height x width, such as 128x96, or one number for both")
    return int(match[1]), int(match[2] or match[1])
