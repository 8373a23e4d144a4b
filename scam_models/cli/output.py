"""How commands write what they found."""

from __future__ import annotations

import sys

from rich.console import Console


def output_console() -> Console:
    """For the output stream: as wide as the terminal; lines stay whole in files and pipes."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
