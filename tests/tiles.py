"""Tiles of kernels in Triton as the tests want them."""

from __future__ import annotations

import dataclasses

import pytest

from sca_kernels.triton import launch

_SMALL = {
    "PIXELS": 16, "CHANNELS": 16, "BLOCKS": 4, "SLOTS": 4, "WIDTH": 16, "LINES": 4, "ELEMENTS": 8,
    "BLOCK_CHANNELS": 4, "BLOCK_PIXELS": 16, "TILES": 2, "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 16, "MOST_WIDTH": 16,
}  # fmt: skip


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a tiny map has several, in several chunks, with ends that are not full."""
    lookup = launch._lookup

    def shrink(*row: str) -> launch.Configuration:
        found = lookup(*row)
        return dataclasses.replace(found, blocks={name: _SMALL[name] for name in found.blocks})

    monkeypatch.setattr(launch, "_lookup", shrink)
