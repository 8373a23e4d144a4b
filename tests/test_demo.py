"""The demonstration: from the photographs to the picture, with few steps and small; and what it trains towards."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "demo")
    yield importlib.import_module("run")
    for name in ("run", "comparison"):
        del sys.modules[name]


@pytest.mark.subprocess
def test_demo(native, tmp_path):
    picture = tmp_path / "folder" / "picture.png"
    result = subprocess.run(
        [sys.executable, "demo/run.py", "--steps", "3", "--size", str(SIZE), "--output", str(picture)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"3/3 .*step/s.*loss=\d", result.stderr)
    for name in ("astronaut", "grace_hopper"):
        assert re.search(rf"{name}: reconstruction \d+\.\d dB.* \d+\.\d dB", result.stdout)
    costs = re.findall(r"^  (\D+) +\d+ ms +([\d.]+)x +peak +(\d+) MiB", result.stdout, re.MULTILINE)
    assert [name.strip() for name, _, _ in costs] == ["sca-kernels", "dense, as published"]
    ours, theirs = (int(mebibytes) for _, _, mebibytes in costs)
    assert 0 < ours < theirs
    with Image.open(picture) as image:
        assert image.width > 2 * image.height and len(image.convert("RGB").getcolors(1 << 20)) > 1000


def test_expected_transfers(demo):
    portraits = demo.load_portraits(SIZE)
    transfers, is_shown = demo.expected_transfers(portraits)
    one, other = portraits.photographs
    for transfer, subject, background, known, labels in zip(
        transfers, (one, other), (other, one), is_shown[:, 0], portraits.labels.labels, strict=True
    ):
        is_subject = labels != demo.BACKGROUND
        assert torch.equal(transfer[:, is_subject], subject[:, is_subject]) and known[is_subject].all()
        seen = known & ~is_subject
        assert torch.equal(transfer[:, seen], background[:, seen]) and seen.float().mean() > 0.2
        assert 0 < (~known).float().mean() < 0.4


def test_fill(demo):
    images = torch.rand(1, 3, 16, 16)
    is_known = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    is_known[..., 4:14, 2:9] = False
    filled = demo.fill(images, is_known)
    known = is_known.expand_as(images)
    assert torch.equal(filled[known], images[known])
    assert images[known].min() <= filled.min() and filled.max() <= images[known].max()
    assert filled[~known].std() < 0.5 * images[~known].std()
