"""Writes ``docs/gpu-validation.md`` from ``bench/results/*.json``: what is known of each kernel on a GPU.

python -m bench.gpu.validation [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sca_kernels.backends import BACKENDS

from .calls import RESULTS, ROOT

PAGE = ROOT / "docs" / "gpu-validation.md"

_INTRODUCTION = """# What is known of the kernels on a GPU

Written by `python -m bench.gpu.validation` from `bench/results/<device>.json`, which `make gpu` writes on a machine
with a GPU. Nothing else in this repository says how the kernels in Triton do on a GPU.

Without one they are run by Triton's interpreter on the CPU (`make test`), and compiled for sm_80, sm_90, sm_100 and
gfx942 (`make compile-gpu`), which checks registers, spills, shared memory and that products became instructions of the
matrix units. Neither says anything of speed, and the interpreter says nothing of what the compiler makes.
`python -m bench.gpu.traffic` counts the bytes that the kernels must move, which the shares of the bandwidth of a copy
below refer to. `label_plan` is made of PyTorch's own kernels, and only tested.

The kernels in CUDA C++, the backend `cuda`, have never run on a GPU. `make test` runs their bodies on the host, thread
after thread, and `docs/cuda-kernels.md` lists what they compile to.
"""


_COLUMNS = (
    "operator",
    "device",
    "commit",
    "call",
    "error",
    "of gradients",
    "copy bandwidth, forward",
    "with backward",
    "fastest other / ours, forward",
)


def page(results: Path = RESULTS) -> str:
    lines = [_INTRODUCTION, _line(_COLUMNS), "|" + "---|" * len(_COLUMNS)]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    for operator in sorted(BACKENDS["triton"].operators or ()):
        rows = [
            _row(report, figure) for report in reports for figure in report["figures"] if figure["operator"] == operator
        ]
        lines += rows or [_line([f"`{operator}`", "never run on a GPU", *[""] * (len(_COLUMNS) - 2)])]
    return "\n".join(lines) + "\n"


def _row(report: dict[str, Any], figure: dict[str, Any]) -> str:
    errors = [figure["error"], figure.get("gradient_error", "")]
    shares = [figure["forward_share_of_copy_bandwidth"], figure["share_of_copy_bandwidth"]]
    # A copy computes nothing, and instance norm something else.
    times = {name: rival.get("forward_ms") for name, rival in figure["rivals"].items()}
    others = [(time, name) for name, time in times.items() if time and name not in ("copy", "instance_norm")]
    fastest = ""
    if others:
        time, name = min(others)
        fastest = f"{time / figure['forward_ms']:.1f} ({name})"
    return _line(
        [
            f"`{figure['operator']}`",
            report["device"],
            report["commit"][:12],
            f"{figure['call']}, {figure['dtype']}",
            *(error if isinstance(error, str) else f"{error:.1e}" for error in errors),
            *(f"{share:.0%}" for share in shares),
            fastest,
        ]
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    if parser.parse_args().check:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
