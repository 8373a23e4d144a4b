"""A run of the benchmarks: what is asked of them, and what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch

from . import report, timing
from .check import Guard
from .report import Comparison, Goal
from .timing import Contender, Figure, Pace

_Choice = TypeVar("_Choice")


class Run:
    """Handed to every benchmark as the fixture ``run``.

    Attributes:
        full: whether to time at full size; otherwise results are only checked, at small sizes.
        benchmark: the benchmark that is running; names its file of results.
        comparisons: those made so far, at full size.
        checked: number of results that were compared with a float64 one.
        guard: what comparisons of times are held against instead of being recorded, if they are.
    """

    def __init__(self, full: bool, guard: Guard | None = None) -> None:
        self.full = full
        self.guard = guard
        self.benchmark = ""
        self.comparisons: list[Comparison] = []
        self.checked = 0

    def choose(self, small: _Choice, full: _Choice) -> _Choice:
        """One of two sizes."""
        return full if self.full else small

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.compile`` at full size; compiling would take most of the time of a small run."""
        return torch.compile(function, dynamic=False, fullgraph=True) if self.full else function

    def compare(
        self,
        contenders: Sequence[Contender],
        *,
        table: str,
        row: str,
        dtype: torch.dtype = torch.float32,
        goals: Sequence[Goal] = (),
        absent: Sequence[Figure] = (),
        unit: str = "ms",
        seconds: float = 4.0,
        pace: Pace | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Checks the contenders and, at full size, times them for about ``seconds``, or at a given pace."""
        pace = Pace(seconds) if pace is None else pace
        tolerance = timing.TOLERANCE[dtype] if tolerance is None else tolerance
        if self.guard is not None:
            self._hold(self.guard, contenders, table, row, dtype, pace, tolerance)
            return
        figures = timing.compare(contenders, tolerance, pace if self.full else None)
        figures = [*figures, *absent]
        self.record(figures, table=table, row=row, dtype=dtype, goals=goals, unit=unit)

    def _hold(
        self,
        guard: Guard,
        contenders: Sequence[Contender],
        table: str,
        row: str,
        dtype: torch.dtype,
        pace: Pace,
        tolerance: float,
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        known = guard.known(self.benchmark, table, row, name, torch.get_num_threads())
        if known is None:
            return
        wrong = guard.hold(known, lambda: timing.compare(contenders, tolerance, pace))
        if wrong:
            pytest.fail("; ".join(wrong))

    def record(
        self,
        figures: Sequence[Figure],
        *,
        table: str,
        row: str,
        dtype: torch.dtype = torch.float32,
        goals: Sequence[Goal] = (),
        unit: str = "ms",
        allocator: str | None = None,
    ) -> None:
        """Keeps figures, at full size, and fails the test if a contender's result was wrong."""
        self.checked += sum(figure.error is not None for figure in figures)
        if self.full and self.guard is None:
            threads = torch.get_num_threads()
            comparison = Comparison(self.benchmark, table, row, figures, dtype, threads, unit, goals)
            self.comparisons.append(comparison)
            report.append(comparison, report.describe_machine(allocator or current_allocator()))
        failed = [f"{figure.name} {figure.problem}" for figure in figures if figure.failed]
        if failed:
            pytest.fail(f"{table}, {row}: {'; '.join(failed)}")


def keeps_freed_memory() -> bool:
    """Whether this process was started with the settings of :data:`bench.timing.REUSED_MEMORY`."""
    return all(os.environ.get(name) == value for name, value in timing.REUSED_MEMORY.items())


def current_allocator() -> str:
    """The allocator of this process in words."""
    return "memory kept" if keeps_freed_memory() else "system default"
