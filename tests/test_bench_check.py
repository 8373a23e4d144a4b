"""The guard against becoming slower: what falls, what is noise, and what nothing can be said about."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import recorded, report, timing
from bench.check import ATTEMPTS, Attempt, Guard, decide
from bench.recorded import Machine, Measurement, Recorded
from bench.run import Run
from bench.timing import MOST_PREEMPTIONS, Contender, Figure, Pace

WHAT = {"benchmark": "nn", "table": "table", "row": "row", "dtype": "float32", "threads": 1}


def committed(ratio: float = 10.0, capability: str = "avx2", threads: int = 1, date: str = "2026-01-01") -> Recorded:
    def measured(name: str, value: float) -> Measurement:
        return Measurement(name, {}, "", 1e-7, value, (value, value), value, (value, value), 0.0)

    machine = Machine("Processor", 2, capability)
    measurements = {name: measured(name, value) for name, value in (("ours", 1.0), ("dense", ratio), ("copy", 0.5))}
    return Recorded(
        machine, threads, "nn", "table", "row", "float32", "ms", "memory kept", date, "abc", "2.13", measurements
    )


def guard(*known: Recorded) -> Guard:
    return Guard(lambda benchmark: list(known), capability="avx2")


def figures(ratio: float, *, disturbed: bool = False, problem: str = "") -> list[Figure]:
    """Of ours and of a rival, in three rounds; one of them is an outlier that a mean would follow."""
    preemptions = 2.0 * MOST_PREEMPTIONS if disturbed else 0.0
    ours = (1.0, 2.0, 1.0)
    times = (ratio, 2 * ratio, 100 * ratio)
    return [
        Figure("ours", {}, median=1.0, rounds=ours, preemptions=preemptions),
        Figure("dense", {}, problem, median=ratio, rounds=times, preemptions=0.0),
        Figure("copy", {}, median=0.1, rounds=(0.1, 0.1, 0.1), preemptions=0.0),
        Figure("ours + plan", {}, median=0.1, rounds=(0.1, 0.1, 0.1), preemptions=0.0),
    ]


def script(*attempts: list[Figure]) -> tuple[Callable[[], list[Figure]], list[list[Figure]]]:
    """Returns one attempt after the other, and those that are left."""
    left = list(attempts)
    return lambda: left.pop(0), left


@pytest.mark.parametrize(
    "attempts, state",
    [
        ([(10.0, False)], "held"),
        ([(8.0, False)], "held"),
        ([(7.9, False)], "fell"),
        ([(7.9, True)], "undecided"),
        ([(8.0, True)], "held"),
        ([(7.0, False), (9.0, False)], "held"),
        ([(7.0, True), (7.9, False)], "fell"),
        ([(30.0, False)], "held"),
    ],
)
def test_decision(attempts: list[tuple[float, bool]], state: str) -> None:
    assert decide(10.0, [Attempt(*attempt) for attempt in attempts]) == state


def test_what_holds_is_measured_once() -> None:
    measure, left = script(figures(9.0), figures(1.0))
    held = guard()
    assert held.hold(committed(), measure) == []
    assert len(left) == 1
    assert [(verdict.rival, verdict.state, verdict.now) for verdict in held.verdicts] == [("dense", "held", 9.0)]


def test_noise_is_measured_again() -> None:
    measure, left = script(figures(5.0), figures(9.0), figures(1.0))
    assert guard().hold(committed(), measure) == []
    assert len(left) == 1


def test_what_fell_in_every_attempt_fails_with_the_best_of_them() -> None:
    measure, left = script(*(figures(ratio) for ratio in (5.0, 7.0, 6.0)[:ATTEMPTS]), figures(10.0))
    (wrong,) = guard().hold(committed(), measure)
    assert "dense 7x, committed 10x (-30%)" in wrong and "table, row" in wrong
    assert len(left) == 1


def test_disturbed_attempts_prove_nothing() -> None:
    measure, _ = script(*[figures(5.0, disturbed=True)] * ATTEMPTS)
    undecided = guard()
    assert undecided.hold(committed(), measure) == []
    assert [verdict.state for verdict in undecided.verdicts] == ["undecided"]
    assert undecided.summary()[0].startswith("undecided: dense")


def test_wrong_results_fail() -> None:
    measure, _ = script(figures(10.0, problem="failed: relative error"))
    assert guard().hold(committed(), measure) == ["dense failed: relative error"]


@pytest.mark.parametrize("changes", [{"capability": "avx512"}, {"threads": 2}], ids=str)
def test_other_instructions_and_threads_are_not_compared_with(changes: dict[str, object]) -> None:
    alone = guard(committed(**changes))
    assert alone.known(**WHAT) is None
    assert alone.summary() == [
        "nothing is committed for 1 comparison with avx2 and this number of threads:",
        "    table, row",
        "nothing was compared",
    ]


def test_the_newest_is_compared_with() -> None:
    found = guard(committed(3.0), committed(5.0, date="2026-02-01"), committed(4.0, date="2025-01-01")).known(**WHAT)
    assert found is not None and found.measurements["dense"].median == 5.0


@pytest.mark.subprocess
def test_only_what_is_committed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(recorded, "RESULTS", results)
    recorded_line = (Path(__file__).parent.parent / "bench/results/nn.jsonl").read_text().splitlines()[0]
    git = ["git", "-c", "user.name=name", "-c", "user.email=name@example.com", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run([*git, *command], check=True)
    (results / "nn.jsonl").write_text(recorded_line + "\n")
    assert recorded.committed("nn") == []
    for command in (["add", "."], ["commit", "-q", "-m", "results"]):
        subprocess.run([*git, *command], check=True)
    (results / "nn.jsonl").write_text(json.dumps({**json.loads(recorded_line), "row": "not committed"}) + "\n")
    assert [comparison.row for comparison in recorded.committed("nn")] == [json.loads(recorded_line)["row"]]


def test_a_run_holds_its_comparisons_and_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    zeros, pace = (torch.zeros(2),), Pace(seconds=0.01, turn_seconds=0.001)
    contenders = [Contender(name, lambda: zeros, zeros, {}) for name in ("ours", "dense")]
    for ratio, expectation in ((1e-3, nullcontext()), (1e3, pytest.raises(pytest.fail.Exception, match="fell: dense"))):
        run = Run(full=True, guard=guard(committed(ratio)))
        run.benchmark = "nn"
        # Other processes may take the cores here, which proves nothing.
        monkeypatch.setattr("bench.timing.MOST_PREEMPTIONS", math.inf)
        with timing.threads(1), expectation:
            run.compare(contenders, table="table", row="row", pace=pace)
        run.record(figures(10.0), table="table", row="row")
    assert list(tmp_path.iterdir()) == []
