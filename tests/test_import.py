"""What ``import sca_kernels`` brings, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sca_kernels

ROOT = Path(__file__).resolve().parents[1]

# PyTorch comes first, so that what it imports and how long it takes is not counted.
MEASURE = """
import json, sys, time, warnings

begin = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - begin
before = set(sys.modules)
for name in {blocked}:
    sys.modules[name] = None
warnings.simplefilter("error")

begin = time.perf_counter()
import {package}
seconds = time.perf_counter() - begin

added = sorted(name for name in set(sys.modules) - before if sys.modules[name] is not None)
print(json.dumps({{"seconds": seconds, "torch_seconds": torch_seconds, "added": added}}))
"""


def measure(blocked: tuple[str, ...] = (), package: str = "sca_kernels") -> tuple[float, float, list[str]]:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.format(blocked=blocked, package=package)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "SCA_BACKEND"},
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    return found["seconds"], found["torch_seconds"], found["added"]


@pytest.mark.subprocess
def test_import_brings_nothing_but_itself_and_is_quick() -> None:
    seconds, torch_seconds, added = measure()
    packages = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert packages <= {"sca_kernels", "torch"}
    assert not [name for name in added if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert not [name for name in added if name.startswith(("sca_kernels.nn", "sca_kernels.interop"))]
    # Some 15 milliseconds against a second; the ratio does not depend on what else the machine does.
    assert seconds < 0.25 * torch_seconds


OPTIONAL = (
    *("triton", "PIL", "matplotlib", "numpy", "tqdm", "skimage"),
    *("lightning", "safetensors", "tensorboard", "torchmetrics", "typer", "rich"),
)


@pytest.mark.subprocess
@pytest.mark.parametrize("package", ["sca_kernels", "scam_models"])
def test_import_needs_no_optional_package(package: str) -> None:
    _, _, added = measure(blocked=OPTIONAL, package=package)
    assert package in added
    assert "torch._dynamo" not in added  # it takes longer than everything else


def test_public_names() -> None:
    assert len(set(sca_kernels.__all__)) == len(sca_kernels.__all__)
    for name in sca_kernels.__all__:
        assert getattr(sca_kernels, name) is not None
    assert {"LabelMap", "LatentLayout", "backend", "semantic_cross_attention"} <= set(sca_kernels.__all__)


def test_package_says_that_it_is_typed() -> None:
    assert (Path(sca_kernels.__file__).parent / "py.typed").exists()
