"""What earlier runs found: the lines of ``bench/results/*.jsonl``, put together again as the comparisons they were."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import RESULTS
from .timing import MOST_PREEMPTIONS

_CAPABILITIES = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline instructions", "none": "no kernels"}


@dataclass(frozen=True, order=True)
class Machine:
    """What figures must share to stand beside each other.

    Attributes:
        device: the processor or graphics processor.
        cores: of the processor.
        capability: the instruction set that the kernels used.
    """

    device: str
    cores: int
    capability: str

    def __str__(self) -> str:
        return f"{self.device}, {self.cores} cores, {_CAPABILITIES.get(self.capability, self.capability)}"

    @property
    def slug(self) -> str:
        """For names of files."""
        words = "".join(character if character.isalnum() else " " for character in self.device.lower()).split()
        return "-".join([*words, str(self.cores), self.capability])


@dataclass(frozen=True)
class Measurement:
    """What was recorded of one contender.

    Attributes:
        name: the contender.
        shape: what was computed.
        problem: why there is no figure, or empty.
        error: largest relative error of its results, None if nothing was checked.
        median, quartiles: in the comparison's unit.
        ratio, ratio_quartiles: to the first contender; the quartiles are those of the rounds' ratios.
        preemptions: how often in a second another process took a core.
    """

    name: str
    shape: Mapping[str, int]
    problem: str
    error: float | None
    median: float | None
    quartiles: tuple[float | None, float | None]
    ratio: float | None
    ratio_quartiles: tuple[float, float] | None
    preemptions: float

    @property
    def disturbed(self) -> bool:
        """Whether other processes wanted the cores meanwhile."""
        return self.preemptions > MOST_PREEMPTIONS


@dataclass(frozen=True)
class Ratio:
    """Of two contenders' medians; the quartiles of the rounds' ratios are known where one of them is the first."""

    value: float
    lower: float | None
    upper: float | None
    disturbed: bool


@dataclass(frozen=True)
class Recorded:
    """One comparison as it was recorded.

    Attributes:
        machine, threads: where it ran.
        benchmark: the file of results.
        table, row: what was compared.
        dtype, unit, allocator: of the figures.
        date, commit, torch: when, and what ran.
        measurements: by contender; the first is the one that the others are compared with.
    """

    machine: Machine
    threads: int
    benchmark: str
    table: str
    row: str
    dtype: str
    unit: str
    allocator: str
    date: str
    commit: str
    torch: str
    measurements: dict[str, Measurement] = field(default_factory=dict, compare=False)

    @property
    def subject(self) -> tuple[object, ...]:
        """What a newer comparison must share to take this one's place."""
        return (
            self.machine,
            self.threads,
            self.benchmark,
            self.table,
            self.row,
            self.dtype,
            self.unit,
            self.allocator,
        )

    @property
    def base(self) -> str:
        return next(iter(self.measurements))

    @property
    def shown(self) -> dict[str, Measurement]:
        """Those that have a figure and whose result was found right in that run. Memory is counted, not computed."""
        return {
            name: measurement
            for name, measurement in self.measurements.items()
            if not measurement.problem
            and measurement.median is not None
            and (measurement.error is not None or self.unit == "MiB")
        }

    def ratio(self, numerator: str, denominator: str) -> Ratio | None:
        """Of two contenders that are shown."""
        shown = self.shown
        if numerator not in shown or denominator not in shown:
            return None
        top, bottom = shown[numerator], shown[denominator]
        assert top.median is not None and bottom.median is not None
        lower: float | None = None
        upper: float | None = None
        if bottom.name == self.base and top.ratio_quartiles:
            lower, upper = top.ratio_quartiles
        elif top.name == self.base and bottom.ratio_quartiles and all(bottom.ratio_quartiles):
            upper, lower = (1 / quartile for quartile in bottom.ratio_quartiles)
        return Ratio(top.median / bottom.median, lower, upper, top.disturbed or bottom.disturbed)


def read(lines: Iterable[str]) -> list[Recorded]:
    """Comparisons in the order in which they were recorded. A comparison is a run of lines that share all but their
    contender."""
    found: list[Recorded] = []
    for line in lines:
        entry = json.loads(line)
        comparison, measurement = _comparison(entry), _measurement(entry)
        if not found or found[-1] != comparison or measurement.name in found[-1].measurements:
            found.append(comparison)
        found[-1].measurements[measurement.name] = measurement
    return found


def read_all(folder: Path = RESULTS) -> list[Recorded]:
    """Those of all benchmarks."""
    return [found for path in sorted(folder.glob("*.jsonl")) for found in read(path.read_text().splitlines())]


def committed(benchmark: str) -> list[Recorded]:
    """Those of one benchmark in the last commit, so that nothing is compared with what it left behind itself."""
    command = ["git", "show", f"HEAD:./results/{benchmark}.jsonl"]
    shown = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return read(shown.stdout.splitlines()) if shown.returncode == 0 else []


def newest(comparisons: Iterable[Recorded]) -> list[Recorded]:
    """Of every subject the last one, in the order in which the subjects first occur."""
    last: dict[tuple[object, ...], Recorded] = {}
    for comparison in comparisons:
        known = last.get(comparison.subject)
        if known is None or comparison.date >= known.date:
            last[comparison.subject] = comparison
    return list(last.values())


def machines(comparisons: Sequence[Recorded]) -> list[Machine]:
    """Those with most comparisons first."""
    counts = {machine: 0 for machine in sorted({comparison.machine for comparison in comparisons})}
    for comparison in comparisons:
        counts[comparison.machine] += 1
    return sorted(counts, key=lambda machine: -counts[machine])


def _comparison(entry: Mapping[str, Any]) -> Recorded:
    return Recorded(
        machine=Machine(entry["device"], entry["cores"], entry["capability"]),
        **{
            name: entry[name]
            for name in (
                "threads",
                "benchmark",
                "table",
                "row",
                "dtype",
                "unit",
                "allocator",
                "date",
                "commit",
                "torch",
            )
        },
    )


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    lower, upper = entry["quartiles"]
    ratio_quartiles = entry["ratio_quartiles"]
    return Measurement(
        name=entry["contender"],
        shape=entry["shape"],
        problem=entry["problem"] or "",
        error=entry["relative_error"],
        median=entry["median"],
        quartiles=(lower, upper),
        ratio=entry["ratio"],
        ratio_quartiles=(ratio_quartiles[0], ratio_quartiles[1]) if ratio_quartiles else None,
        preemptions=entry["preemptions_per_second"] or 0.0,
    )
