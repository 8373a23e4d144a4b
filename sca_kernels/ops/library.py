"""The ``torch.library`` namespace that all operators are defined in."""

from __future__ import annotations

from torch.library import Library

LIBRARY = Library("sca", "DEF")
