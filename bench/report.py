"""What a run of the benchmarks leaves behind: tables at its end and a line of JSON for each figure."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sca_kernels
from sca_kernels import cpu

from .timing import Figure, ratio

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio of two contenders: ``at_most`` or ``at_least``."""

    numerator: str
    denominator: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def wanted(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def is_met(self, ratio: float) -> bool:
        return ratio <= self.at_most if self.at_most is not None else ratio >= (self.at_least or 0)

    def describe(self, figures: Mapping[str, Figure]) -> str | None:
        """The goal beside what was measured, or None if it was not."""
        if self.numerator not in figures or self.denominator not in figures:
            return None
        numerator, denominator = figures[self.numerator], figures[self.denominator]
        measured = ratio(numerator, denominator)
        if measured is None:
            return None
        value, lower, upper = measured
        spread = f"{value:.2f} ({lower:.2f} to {upper:.2f})"
        verdict = "met" if self.is_met(value) else "MISSED"
        if numerator.disturbed or denominator.disturbed:
            verdict = "undecided (*)"
        return f"{self.numerator} / {self.denominator}: {spread}, goal {self.wanted}: {verdict}"


@dataclass(frozen=True)
class Comparison:
    """The figures of one comparison, a line of a table.

    Attributes:
        benchmark: the file of results that it goes to.
        table: title of the table.
        row: name of the line in it.
        figures: the first is the one that the others are compared with.
        dtype: of the data.
        threads: that were used.
        unit: of the figures.
        goals: printed below the table.
    """

    benchmark: str
    table: str
    row: str
    figures: Sequence[Figure]
    dtype: torch.dtype
    threads: int
    unit: str = "ms"
    goals: Sequence[Goal] = ()

    @property
    def disturbed(self) -> bool:
        """Whether other processes took part of the machine meanwhile."""
        return any(figure.disturbed for figure in self.figures)

    @property
    def by_name(self) -> dict[str, Figure]:
        return {figure.name: figure for figure in self.figures}

    def records(self) -> list[dict[str, Any]]:
        """One entry for each figure, without the description of the machine."""
        base = self.figures[0]
        common = {
            "benchmark": self.benchmark,
            "table": self.table,
            "row": self.row,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "unit": self.unit,
        }
        entries = []
        for figure in self.figures:
            relative = ratio(figure, base)
            entry = {
                **common,
                "contender": figure.name,
                "shape": dict(figure.shape),
                "problem": figure.problem or None,
                "relative_error": figure.error,
                "median": _rounded(figure.median),
                "quartiles": [_rounded(figure.lower), _rounded(figure.upper)],
                "page_faults": _rounded(figure.page_faults),
                "preemptions_per_second": _rounded(figure.preemptions),
                "compared_with": base.name,
                "ratio": _rounded(relative[0]) if relative else None,
                "ratio_quartiles": [_rounded(r) for r in relative[1:]] if relative else None,
            }
            entries.append(entry)
        return entries


def describe_machine(allocator: str) -> dict[str, str | float]:
    """What a figure depends on besides its shape. Nothing here names a machine or a person."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": _processor(),
        "cores": os.cpu_count() or 0,
        "capability": capability(),
        "torch": torch.__version__,
        "sca_kernels": sca_kernels.__version__,
        "commit": _commit(),
        "allocator": allocator,
        "load_average": round(os.getloadavg()[0], 2),
    }


def capability() -> str:
    """The instruction set that the kernels use."""
    return cpu.CAPABILITIES[cpu.capability()] if cpu.why_not() is None else "none"


def append(comparison: Comparison, machine: Mapping[str, str | float]) -> None:
    """Adds a comparison to the results of its benchmark."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{comparison.benchmark}.jsonl", "a") as file:
        for record in comparison.records():
            file.write(json.dumps({**machine, **record}) + "\n")


def tables(comparisons: Sequence[Comparison]) -> list[str]:
    """All comparisons as lines of text, in the order in which their tables were begun."""
    lines: list[str] = []
    for title in dict.fromkeys(comparison.table for comparison in comparisons):
        lines += ["", *_table([c for c in comparisons if c.table == title])]
    return lines


def _table(comparisons: Sequence[Comparison]) -> list[str]:
    names = list(dict.fromkeys(f.name for c in comparisons for f in c.figures))
    header = ["", f"{names[0]}, {comparisons[0].unit}", *names[1:]]
    rows = [header]
    for comparison in comparisons:
        figures = comparison.by_name
        base = figures[names[0]]
        cells = [_cell(figures.get(name), base) for name in names[1:]]
        name = f"{comparison.row} (*)" if comparison.disturbed else comparison.row
        rows.append([name, _base_cell(base), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [comparisons[0].table]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *cells]).rstrip())
    return lines + _remarks(comparisons)


def _remarks(comparisons: Sequence[Comparison]) -> list[str]:
    remarks = []
    for comparison in comparisons:
        for goal in comparison.goals:
            description = goal.describe(comparison.by_name)
            if description is not None:
                remarks.append(f"    {comparison.row}: {description}")
    if any(comparison.disturbed for comparison in comparisons):
        remarks.append("    (*) other processes used the cores meanwhile: not to be relied upon")
    problems: dict[str, list[str]] = {}
    for comparison in comparisons:
        for figure in comparison.figures:
            if figure.problem:
                problems.setdefault(f"{figure.name} {figure.problem}", []).append(comparison.row)
    for problem, rows in problems.items():
        where = "every row" if len(rows) == len(comparisons) else "; ".join(rows)
        remarks.append(f"    {problem} [{where}]")
    return remarks


def _base_cell(figure: Figure) -> str:
    if figure.median is None:
        return _absent(figure)
    return f"{_number(figure.median)} ({_number(figure.lower)} to {_number(figure.upper)})"


def _cell(figure: Figure | None, base: Figure) -> str:
    if figure is None:
        return ""
    relative = ratio(figure, base)
    return _absent(figure) if relative is None else f"{relative[0]:.2f}x"


def _absent(figure: Figure) -> str:
    return "FAILED" if figure.failed else "-"


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _processor() -> str:
    try:
        description = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", description, re.MULTILINE)
    return model.group(1) if model else platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
