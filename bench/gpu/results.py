"""The files that say what happened on a GPU: ``bench/results/<device>.json``, to which each run adds.

A file holds the versions of what was used, ``figures`` (:mod:`bench.gpu.run`) and ``tests`` (:mod:`bench.gpu.parts`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sca_kernels

from .calls import RESULTS, ROOT, Call


def path_of(device: str, folder: Path = RESULTS) -> Path:
    """The file of a device, by the name that PyTorch gives it."""
    return folder / f"{device.replace(' ', '-')}.json"


def read(path: Path, device: str) -> dict[str, Any]:
    """What is known of the device so far, with the versions of now."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"figures": [], "tests": {}, **known, "device": device, "versions": versions()}


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Replaces the file at once, so that a process that is stopped leaves a whole one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def figure_of(report: dict[str, Any], call: Call) -> dict[str, Any]:
    """The entry of a call, made if it is not there."""
    key = {"operator": call.operator, "call": call.name, "dtype": str(call.dtype).removeprefix("torch.")}
    for figure in report["figures"]:
        if key.items() <= figure.items():
            found: dict[str, Any] = figure
            return found
    made = {**key, "kernels": {}, "rivals": {}}
    report["figures"].append(made)
    return made


def versions() -> dict[str, str | None]:
    return {
        "sca_kernels": sca_kernels.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def commit() -> str:
    """What the kernels are at; SCA_COMMIT says it where there is no repository."""
    named = os.environ.get("SCA_COMMIT")
    if named:
        return named
    found = _git("rev-parse", "HEAD")[:12] or "unknown"
    return f"{found}-changed" if _git("status", "--porcelain", "--", "csrc", "sca_kernels") else found


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
