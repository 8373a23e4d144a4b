"""How commands write what they found, and how far they are."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def output_console() -> Console:
    """For the output stream: as wide as the terminal; lines stay whole in files and pipes."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def track(items: Iterable[T], count: int, what: str) -> Iterable[T]:
    """The same items, with a bar on the error stream if that is a terminal."""
    console = Console(stderr=True)
    return rich_track(items, what, total=count, console=console, transient=True, disable=not console.is_terminal)
