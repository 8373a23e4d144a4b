"""``scam export``: weights alone, as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import read_model, write_weights
from .models import Checkpoint


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="File that ends with .safetensors.", show_default=False)],
    last: Annotated[bool, typer.Option("--last", help="The weights of the last step, not the averaged ones.")] = False,
) -> None:
    """Write the averaged weights of a checkpoint, with the configuration of model and data, as safetensors."""
    write_weights(out, read_model(checkpoint, averaged=not last))
    print(out)
