"""The ``--benchmark`` option, the ``run`` fixture, and the tables at the end of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import report, timing
from .check import Guard
from .run import Run, current_allocator, keeps_freed_memory

_RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks at full size and time them; otherwise they only check results",
    )

    parser.addoption(
        "--check",
        action="store_true",
        help="with --benchmark: hold the times against the committed ones instead of recording them",
    )


def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("benchmark")
    if full and sys.platform == "linux" and not keeps_freed_memory():
        # The C library reads these settings only when a process starts, so start once more.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **timing.REUSED_MEMORY})
    config.stash[_RUN] = Run(full, Guard() if full and config.getoption("check") else None)


def pytest_report_header(config: pytest.Config) -> str:
    if not config.stash[_RUN].full:
        return "benchmarks: small sizes, results checked, nothing timed (--benchmark times)"
    return f"benchmarks: full size, {torch.get_num_threads()} threads, {current_allocator()}"


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The run that the benchmark belongs to."""
    current = request.config.stash[_RUN]
    current.benchmark = request.module.__name__.rpartition("bench_")[2]
    yield current
    # What one benchmark compiled counts towards the limit of recompilations of the next.
    torch.compiler.reset()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tells the process that shows the summary, where pytest-xdist distributes the benchmarks to others."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["checked"] = session.config.stash[_RUN].checked


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # A worker that crashed has said nothing.
    node.config.stash[_RUN].checked += getattr(node, "workeroutput", {}).get("checked", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    current = config.stash[_RUN]
    write = terminalreporter.write_line
    if not current.full:
        write(f"{current.checked} results checked; no times at small sizes (use --benchmark)")
        return
    terminalreporter.section("benchmarks")
    if current.guard is not None:
        for line in current.guard.summary():
            write(line)
        return
    machine = report.describe_machine(current_allocator())
    write(", ".join(f"{name} {value}" for name, value in machine.items()))
    write(
        "First column of figures: median (quartiles). The others: their time as a multiple of it, so "
        "above 1 is slower. Warm: every contender computes on the same data several times in a row."
    )
    if keeps_freed_memory():
        write(
            "Freed memory is kept for the next call ("
            + " ".join(f"{name}={value}" for name, value in timing.REUSED_MEMORY.items())
            + "), for all contenders alike, except where a title says otherwise."
        )
    for line in report.tables(current.comparisons):
        write(line)
