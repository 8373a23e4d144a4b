"""Whether anything became slower: ``python -m bench.check``, or ``make bench-check``.

A few comparisons run again, and the time of each rival as a multiple of ours is held against the committed one of the
same instruction set and number of threads. A ratio fails that is more than a fifth below. Against noise: a ratio is the
median over rounds in which both took turns, one that fell is measured again, the best attempt counts, and attempts
during which other processes took the cores prove nothing. Nothing is recorded.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from . import recorded, report
from .recorded import Recorded
from .timing import Figure

ALLOWED_FALL = 0.2
ATTEMPTS = 3
# One thread, since threads that wait for each other make noise; and nothing that must be compiled first.
GUARDED = (
    "bench/bench_semantic_cross_attention.py::test_threads[1]",
    "bench/bench_semantic_modulate.py::test_threads[1]",
    "bench/bench_semantic_pool.py::test_threads[1]",
    "bench/bench_instance_modulate.py::test_threads[1]",
    "bench/bench_nn.py::test_threads[1-simplex]",
    "bench/bench_nn.py::test_threads[1-duplex]",
    *(
        f"bench/bench_{operator}.py::test_overhead"
        for operator in ("semantic_cross_attention", "semantic_modulate", "semantic_pool", "instance_modulate")
    ),
)
# A copy is as fast as the memory happens to be.
UNSTEADY = ("copy",)


@dataclass(frozen=True)
class Attempt:
    """A ratio measured once, and whether other processes took the cores meanwhile."""

    ratio: float
    disturbed: bool


@dataclass(frozen=True)
class Verdict:
    """What became of one ratio."""

    row: str
    rival: str
    committed: float
    now: float
    state: Literal["held", "fell", "undecided"]

    def __str__(self) -> str:
        change = self.now / self.committed - 1
        ratios = f"{self.rival} {self.now:.3g}x, committed {self.committed:.3g}x ({change:+.0%})"
        return f"{self.state}: {ratios}, {self.row}"


def decide(committed: float, attempts: Sequence[Attempt]) -> Literal["held", "fell", "undecided"]:
    """Whether a ratio is more than :data:`ALLOWED_FALL` below the committed one."""
    if any(attempt.ratio >= committed * (1 - ALLOWED_FALL) for attempt in attempts):
        return "held"
    return "undecided" if all(attempt.disturbed for attempt in attempts) else "fell"


class Guard:
    """Holds comparisons against the committed ones.

    Args:
        committed: reads the committed comparisons of a benchmark.
        capability: the instruction set that the kernels use.

    Attributes:
        verdicts: all so far.
        unknown: what nothing is committed for.
    """

    def __init__(
        self,
        committed: Callable[[str], list[Recorded]] = recorded.committed,
        capability: str | None = None,
    ) -> None:
        self.capability = report.capability() if capability is None else capability
        self.verdicts: list[Verdict] = []
        self.unknown: list[str] = []
        self._committed = committed

    def known(self, benchmark: str, table: str, row: str, dtype: str, threads: int) -> Recorded | None:
        """The newest committed comparison of the same thing, by the same instructions and threads."""
        wanted = (table, row, dtype, threads, self.capability)
        found = [
            comparison
            for comparison in recorded.newest(self._committed(benchmark))
            if (comparison.table, comparison.row, comparison.dtype, comparison.threads, comparison.machine.capability)
            == wanted
        ]
        if not found:
            self.unknown.append(f"{table}, {row}")
        return max(found, key=lambda comparison: comparison.date, default=None)

    def hold(self, known: Recorded, measure: Callable[[], list[Figure]]) -> list[str]:
        """Measures until every ratio has held or the attempts are used up, and returns what is wrong."""
        attempts: dict[str, list[Attempt]] = {}
        for _ in range(ATTEMPTS):
            figures = measure()
            failed = [f"{figure.name} {figure.problem}" for figure in figures if figure.failed]
            if failed:
                return failed
            for rival, attempt in _ratios(figures).items():
                attempts.setdefault(rival, []).append(attempt)
            verdicts = [self._verdict(known, rival, of_rival) for rival, of_rival in attempts.items()]
            verdicts = [verdict for verdict in verdicts if verdict is not None]
            if all(verdict.state == "held" for verdict in verdicts):
                break
        self.verdicts += verdicts
        return [str(verdict) for verdict in verdicts if verdict.state == "fell"]

    def summary(self) -> list[str]:
        """What a run has shown, in lines of text."""
        lines = [str(verdict) for verdict in self.verdicts]
        if self.unknown:
            rows = f"{len(self.unknown)} comparison{'s' * (len(self.unknown) > 1)}"
            lines.append(f"nothing is committed for {rows} with {self.capability} and this number of threads:")
            lines += [f"    {row}" for row in self.unknown]
        if not self.verdicts:
            lines.append("nothing was compared")
        return lines

    def _verdict(self, known: Recorded, rival: str, attempts: Sequence[Attempt]) -> Verdict | None:
        ratio = known.ratio(rival, known.base)
        if ratio is None or known.base != "ours":
            return None
        best = max(attempt.ratio for attempt in attempts)
        row = f"{known.table.split(':')[0]}, {known.row}"
        return Verdict(row, rival, ratio.value, best, decide(ratio.value, attempts))


def _ratios(figures: Sequence[Figure]) -> dict[str, Attempt]:
    """Of each rival to ours, the first: medians over the rounds."""
    ours, *others = figures
    return {
        figure.name: Attempt(
            statistics.median(top / bottom for top, bottom in zip(figure.rounds, ours.rounds, strict=True)),
            figure.disturbed or ours.disturbed,
        )
        for figure in others
        if figure.rounds and ours.rounds and figure.name not in UNSTEADY and not figure.name.startswith("ours")
    }


if __name__ == "__main__":
    sys.exit(pytest.main([*GUARDED, "--benchmark", "--check", "-q", *sys.argv[1:]]))
