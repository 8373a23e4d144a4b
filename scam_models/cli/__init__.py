"""The command ``scam``: one module for each of its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from ..errors import InputError
from .ablate import ablate
from .attention import attention
from .check import check
from .evaluate import evaluate
from .export import export
from .interpolate import interpolate
from .make_data import make_data
from .reconstruct import reconstruct
from .train import train
from .transfer import transfer

app = typer.Typer(
    name="scam",
    help="SCAM: train on images with label maps, reconstruct, transfer subjects, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("make-data")(make_data)
app.command("check")(check)
app.command("train")(train)
app.command("reconstruct")(reconstruct)
app.command("transfer")(transfer)
app.command("interpolate")(interpolate)
app.command("attention")(attention)
app.command("evaluate")(evaluate)
app.command("export")(export)
app.command("ablate")(ablate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. What is wrong with the input is one line on the error stream and exit code 1.

    Args:
        arguments: Default: those of the process.
    """
    try:
        app(arguments, prog_name="scam")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
