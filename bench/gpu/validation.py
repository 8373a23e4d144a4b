"""Writes ``docs/gpu-validation.md`` from ``bench/results/*.json``: what is known of each kernel on a GPU.

python -m bench.gpu.validation [--check]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sca_kernels.backends import BACKENDS

from .calls import BACKENDS as KERNELS
from .calls import RESULTS, ROOT
from .rivals import YARDSTICKS

PAGE = ROOT / "docs" / "gpu-validation.md"
NEVER = "never run on a GPU"

_INTRODUCTION = """# What is known of the kernels on a GPU

Written by `python -m bench.gpu.validation` from `bench/results/<device>.json`, which `make gpu` writes on a machine
with a GPU. Nothing else in this repository says how the kernels for GPUs do on one.

Without one, the kernels in Triton (backend `triton`) are run by Triton's interpreter on the CPU (`make test`), and
compiled for sm_80, sm_90, sm_100 and gfx942 (`make compile-gpu`), which checks registers, spills, shared memory and
that products became instructions of the matrix units. The bodies of the kernels in CUDA C++ (backend `cuda`) are run by
the host, thread after thread; `docs/cuda-kernels.md` lists what they compile to. None of that says anything of speed,
and little of what a compiler makes. `label_plan` is made of PyTorch's own kernels, and only tested.
"""

_TESTS = """
## Tests

`make gpu-test`, counted by the operator and the backend that a test is about, at the commit at which they last ran.
"""

_FIGURES = """
## Figures

`make gpu-bench`. Errors are the largest of a result and of a gradient, relative to the reference in float64. Calls are
enqueued ahead and find a second-level cache full of other things. Beside each time stands what share of the bandwidth
of a copy it makes of the bytes that the kernels in Triton must move, which is the measure for both backends
(`python -m bench.gpu.traffic` counts them). The last columns say how many times as long others take: the other backend,
forward and with backward, and the fastest of all others, forward.
"""

_SUMMARY = """
## One backend beside the other

The time of `triton` divided by that of `cuda`, the geometric mean over the calls above: above 1, `cuda` is faster.
"""


def page(results: Path = RESULTS) -> str:
    """The text of the page; the sections for which there is nothing to say are left out."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    parts = [_INTRODUCTION, _TESTS, *_table(_test_rows(reports))]
    if any(figure["kernels"] for report in reports for figure in report["figures"]):
        parts += [_FIGURES, *_table(_figure_rows(reports))]
    if summary := list(_summary_rows(reports)):
        parts += [_SUMMARY, *_table(summary)]
    return "\n".join(parts) + "\n"


def kernels() -> list[tuple[str, str]]:
    """Operators with the backends that have kernels for them."""
    return sorted((operator, backend) for backend in KERNELS for operator in BACKENDS[backend].operators or ())


def _test_rows(reports: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for operator, backend in kernels():
        found = [report for report in reports if f"{operator}, {backend}" in report["tests"]]
        if not found:
            yield {"operator": f"`{operator}`", "backend": f"`{backend}`", "device": NEVER}
        for report in found:
            counts = report["tests"][f"{operator}, {backend}"]
            yield {
                "operator": f"`{operator}`",
                "backend": f"`{backend}`",
                "device": report["device"],
                "commit": counts["commit"],
                **{outcome: str(counts[outcome]) for outcome in ("passed", "failed", "skipped")},
            }


def _figure_rows(reports: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for operator, backend in kernels():
        for report in reports:
            for figure in report["figures"]:
                if figure["operator"] == operator and backend in figure["kernels"]:
                    yield _figure_row(report, figure, backend)


def _figure_row(report: Mapping[str, Any], figure: Mapping[str, Any], backend: str) -> dict[str, str]:
    entry = figure["kernels"][backend]
    row = {
        "operator": f"`{figure['operator']}`",
        "backend": f"`{backend}`",
        "device": report["device"],
        "commit": entry["commit"],
        "call": f"{figure['call']}, {figure['dtype']}",
        "error": _number(entry.get("error")),
        "of gradients": _number(entry.get("gradient_error")),
    }
    if "problem" in entry:
        return {**row, "forward": entry["problem"]}
    (other,) = (name for name in KERNELS if name != backend)
    rivals = {**figure["rivals"], other: figure["kernels"].get(other, {})}
    times = {name: time for name, rival in rivals.items() if (time := rival.get("forward_ms")) is not None}
    able = [(time, name) for name, time in times.items() if name not in YARDSTICKS]
    fastest = min(able, default=None)
    ratios = [
        f"{theirs / entry[kind]:.2f}" if (theirs := rivals[other].get(kind)) else ""
        for kind in ("forward_ms", "forward_and_backward_ms")
    ]
    return {
        **row,
        "forward": f"{entry['forward_ms']:.3f} ms, {entry['forward_share_of_copy_bandwidth']:.0%}",
        "with backward": f"{entry['forward_and_backward_ms']:.3f} ms, {entry['share_of_copy_bandwidth']:.0%}",
        "other backend / this": " and ".join(filter(None, ratios)),
        "fastest other / this": f"{fastest[0] / entry['forward_ms']:.1f} ({fastest[1]})" if fastest else "",
    }


def _summary_rows(reports: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for report in reports:
        ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for figure in report["figures"]:
            triton, cuda = (figure["kernels"].get(name, {}) for name in ("triton", "cuda"))
            if "forward_ms" in triton and "forward_ms" in cuda:
                both = tuple(triton[kind] / cuda[kind] for kind in ("forward_ms", "forward_and_backward_ms"))
                ratios.setdefault((figure["operator"], figure["dtype"]), []).append((both[0], both[1]))
        for (operator, dtype), found in sorted(ratios.items()):
            forward, everything = (
                math.exp(sum(map(math.log, column)) / len(found)) for column in zip(*found, strict=True)
            )
            yield {
                "device": report["device"],
                "operator": f"`{operator}`",
                "type": dtype,
                "forward": f"{forward:.2f}",
                "with backward": f"{everything:.2f}",
            }


def _table(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Lines of a table with the columns of its longest row."""
    found = list(rows)
    columns = list(max(found, key=len))
    lines = [[row.get(column, "") for column in columns] for row in found]
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines)]


def _number(error: float | str | None) -> str:
    return f"{error:.1e}" if isinstance(error, float) else error or ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    if parser.parse_args().check:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
