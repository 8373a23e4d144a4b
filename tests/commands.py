"""Runs the command ``scam`` in this process."""

from __future__ import annotations

import pytest

from scam_models.cli import main


def run_command(*arguments: str) -> int:
    """Its exit code."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert isinstance(raised.value.code, int)
    return raised.value.code
