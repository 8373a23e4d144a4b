"""``scam check``: every file of a data set that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..data import Problem
from ..data import check as check_data
from ..data.folders import SPLITS
from .options import DataFolder, NumLabels, Preset, data_configuration
from .output import output_console, track


def check(
    data: DataFolder,
    preset: Preset = "tiny",
    labels: NumLabels = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Check this split only; may be repeated.", show_default=False)
    ] = None,
) -> None:
    """Read every image and label map of DATA and list those that cannot be used. Exit code 1 if there are any."""
    configuration = data_configuration(preset, labels)

    def progress(names: Iterable[str], count: int) -> Iterable[str]:
        return track(names, count, "reading")

    splits = tuple(split or SPLITS)
    problems = check_data(data, configuration, splits=splits, progress=progress)
    if problems:
        console = output_console()
        console.print(problems_table(problems))
        console.print(f"{len(problems)} problems in {data}, read as {preset}: {configuration.num_labels} labels")
        raise typer.Exit(1)
    print(f"{data}: no problems in {' and '.join(splits)}")


def problems_table(problems: Iterable[Problem]) -> Table:
    """A row for each problem."""
    table = Table("file", "problem", box=None, pad_edge=False)
    for problem in problems:
        table.add_row(Text(str(problem.path), overflow="fold"), Text(problem.reason))  # not markup: names may hold [
    return table
