"""The report: newest runs only, machines apart, nothing shown that was not found right, every goal judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import charts, performance, recorded
from bench.catalogue import CHARTS, Chart
from bench.charts import Bar, Curve, Group
from bench.goals import TARGETS, Target
from bench.recorded import Machine, Recorded
from bench.report import Goal

TABLE = "Pixels attend to latents, forward: k = 8, D = 256, H = 1, float32"
ROW = "65,536 pixels, 19 labels"


def line(contender: str, median: float | None = 2.0, *, ratio: float | None = 1.0, **changes: Any) -> str:
    """A line of results; the first contender of a comparison is compared with itself."""
    entry = {
        "date": "2026-01-01",
        "device": "Processor",
        "cores": 2,
        "capability": "avx2",
        "torch": "2.13.0",
        "commit": "abc1234",
        "allocator": "memory kept",
        "benchmark": "semantic_cross_attention",
        "table": TABLE,
        "row": ROW,
        "dtype": "float32",
        "threads": 2,
        "unit": "ms",
        "contender": contender,
        "shape": {},
        "problem": None,
        "relative_error": 1e-7,
        "median": median,
        "quartiles": [median, median],
        "preemptions_per_second": 0.0,
        "ratio": ratio,
        "ratio_quartiles": [ratio, ratio],
    }
    return json.dumps({**entry, **changes})


def failed(contender: str, **changes: Any) -> str:
    nothing = {"quartiles": [None, None], "ratio_quartiles": None}
    return line(contender, None, ratio=None, problem="failed: relative error 1.0e+00 > 1e-05", **nothing, **changes)


def page_of(lines: Sequence[str], folder: Path) -> tuple[str, str]:
    """The page and its tables."""
    results = folder / "results"
    results.mkdir()
    (results / "semantic_cross_attention.jsonl").write_text("\n".join(lines) + "\n")
    page, tables, *_ = performance.write(results, folder / "docs")
    return page.read_text(), tables.read_text()


def test_lines_become_comparisons() -> None:
    found = recorded.read([line("ours"), line("dense"), line("ours", row="other"), line("ours"), line("ours")])
    assert [(comparison.row, list(comparison.measurements)) for comparison in found] == [
        (ROW, ["ours", "dense"]),
        ("other", ["ours"]),
        (ROW, ["ours"]),
        (ROW, ["ours"]),
    ]


@pytest.mark.parametrize(
    "change, kept",
    [
        ({}, [7.0]),
        ({"date": "2025-12-31"}, [2.0]),
        ({"device": "Another"}, [2.0, 7.0]),
        ({"capability": "avx512"}, [2.0, 7.0]),
        ({"threads": 1}, [2.0, 7.0]),
        ({"dtype": "bfloat16"}, [2.0, 7.0]),
        ({"commit": "def5678"}, [7.0]),
    ],
    ids=str,
)
def test_only_the_newest_of_a_machine_counts(change: dict[str, Any], kept: list[float]) -> None:
    found = recorded.newest(recorded.read([line("ours"), line("ours", 7.0, **change)]))
    assert [comparison.measurements["ours"].median for comparison in found] == kept


def test_figures_that_are_wrong_or_unchecked_are_not_shown() -> None:
    lines = [line("ours"), failed("dense"), line("SDPA", relative_error=None), line("loop", problem="failed: it")]
    (comparison,) = recorded.read(lines)
    assert list(comparison.shown) == ["ours"]
    assert comparison.ratio("dense", "ours") is None
    assert comparison.ratio("SDPA", "ours") is None
    (memory,) = recorded.read([line("ours", unit="MiB", relative_error=None)])
    assert list(memory.shown) == ["ours"]


def test_ratios_carry_the_spread_of_the_rounds() -> None:
    (comparison,) = recorded.read([line("ours", 2.0), line("dense", 8.0, ratio=4.0, ratio_quartiles=[3.2, 5.0])])
    slower, faster = comparison.ratio("dense", "ours"), comparison.ratio("ours", "dense")
    assert slower is not None and faster is not None
    assert (slower.value, slower.lower, slower.upper) == (4.0, 3.2, 5.0)
    assert (faster.value, faster.lower, faster.upper) == (0.25, 0.2, 1 / 3.2)


@pytest.mark.parametrize(
    "lines, goal, verdict",
    [
        ([line("ours"), line("dense", 8.0)], Goal("dense", "ours", at_least=4), "met"),
        ([line("ours"), line("dense", 7.9)], Goal("dense", "ours", at_least=4), "missed"),
        ([line("ours"), line("dense", 4.0)], Goal("ours", "dense", at_most=0.5), "met"),
        ([line("ours"), line("dense", 3.9)], Goal("ours", "dense", at_most=0.5), "missed"),
        ([line("ours"), failed("dense")], Goal("dense", "ours", at_least=4), "not measured"),
        (
            [line("ours"), line("dense", 9.0, preemptions_per_second=500.0)],
            Goal("dense", "ours", at_least=4),
            "undecided: other processes took the cores",
        ),
        (
            [line("ours"), line("dense", 9.0), line("ours", row="b"), line("dense", 3.0, row="b")],
            Goal("dense", "ours", at_least=4),
            "missed, met in 1 of 2",
        ),
    ],
)
def test_verdicts(lines: list[str], goal: Goal, verdict: str) -> None:
    target = Target("what", ".*", ".*", [goal])
    assert performance.judge(target, recorded.read(lines))[1] == verdict


def test_the_worst_figure_is_shown() -> None:
    lines = [line("ours"), line("dense", 9.0), line("ours", row="bad"), line("dense", 3.0, row="bad")]
    lines += [line("ours", row="disturbed"), line("dense", 1.0, row="disturbed", preemptions_per_second=500.0)]
    figure, _ = performance.judge(Target("", ".*", ".*", [Goal("dense", "ours", at_least=4)]), recorded.read(lines))
    assert figure.startswith("1.5x") and figure.endswith("bad")
    figure, _ = performance.judge(Target("", ".*", ".*", [Goal("ours", "dense", at_most=1)]), recorded.read(lines))
    assert figure.startswith("0.667x") and figure.endswith("bad")


def test_the_page_states_what_ran_where(tmp_path: Path) -> None:
    lines = [line("ours"), line("dense", 34.0, ratio=17.0), failed("SDPA")]
    lines += [
        line("ours", 3.0, device="Another", threads=1),
        line("dense", 9.0, device="Another", threads=1, ratio=3.0),
    ]
    page, tables = page_of(lines, tmp_path)
    for text in ("## Processor, 2 cores, AVX2", "## Another, 2 cores, AVX2", "threads: 1;", "threads: 2;", "`abc1234`"):
        assert text in page
    assert "`SDPA` failed: relative error" in page
    assert "| 2 ms (2 to 2) | 17x (17 to 17) | failed: relative error" in tables
    assert "| 3 ms (3 to 3) | 3x (3 to 3) |" in tables
    pictures = sorted(path.name for path in (tmp_path / "docs" / "performance").glob("*.svg"))
    assert [name for name in pictures if name.endswith("avx2-cross-attention.svg")] == [
        "another-2-avx2-cross-attention.svg",
        "processor-2-avx2-cross-attention.svg",
    ]
    assert all(f"(performance/{name})" in page for name in pictures)
    drawn = (tmp_path / "docs" / "performance" / "processor-2-avx2-cross-attention.svg").read_text()
    assert "17x" in drawn and "SDPA" not in drawn


def test_what_is_not_shown_is_listed_once(tmp_path: Path) -> None:
    more = {"row": "65,536 pixels, 151 labels"}
    lines = [line("ours"), line("loop"), failed("SDPA"), failed("Flex")]
    lines += [line("ours", **more), line("loop", **more, problem="skipped: slow"), failed("SDPA", **more)]
    page, _ = page_of(lines, tmp_path)
    listed = [found for found in page.splitlines() if found.startswith("- Not shown")]
    assert listed == [
        "- Not shown: `SDPA` failed: relative error 1.0e+00 > 1e-05, everywhere.",
        "- Not shown: `Flex` failed: relative error 1.0e+00 > 1e-05, everywhere.",
        "- Not shown: `loop` skipped: slow, in Pixels attend to latents, forward (65,536 pixels, 151 labels).",
    ]


def test_small_parts_are_among_the_others(tmp_path: Path) -> None:
    table = "Where the time goes, inference: k = 8, batch 1, float32"
    parts = {
        "before": {"convolutions": 40.0, "softmax": 8.0, "plans": 1.0, "other operators": 51.0},
        "after": {"convolutions": 40.0, "softmax": 0.5, "plans": 0.5, "other operators": 9.0},
    }
    page, _ = page_of(
        [
            line(name, value, table=table, row=f"ADE20K, {when}", ratio=None, ratio_quartiles=None)
            for when, values in parts.items()
            for name, value in values.items()
        ],
        tmp_path,
    )
    assert "Where the time of a model goes" in page
    drawn = (tmp_path / "docs" / "performance" / "processor-2-avx2-breakdown.svg").read_text()
    for text in (
        "inference, ADE20K",
        "before",
        "after",
        "convolutions",
        "softmax",
        "other operators",
        "100 ms",
        "50 ms",
    ):
        assert f">{text}<" in drawn, text
    assert "plans" not in drawn


def test_the_same_results_make_the_same_files(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "a.jsonl").write_text("\n".join([line("ours"), line("dense", 34.0, ratio=17.0)]))
    contents = [[path.read_bytes() for path in performance.write(results, tmp_path / "docs")] for _ in range(2)]
    assert contents[0] == contents[1]


def test_goals_and_pictures_are_about_recorded_tables() -> None:
    """A title that changed in a benchmark would silently leave the report."""
    comparisons = recorded.newest(recorded.read_all())
    unmeasured = {target.measure for target in TARGETS if not any(target.covers(found) for found in comparisons)}
    assert all("inference" in measure or "on a GPU" in measure for measure in unmeasured)
    drawn = {chart.name for chart in CHARTS if any(_draws(chart, found) for found in comparisons)}
    longest_known = {"cross-attention", "semantic-modulate-nchw", "modulation-duplex", "models", "memory", "floor"}
    assert longest_known <= drawn
    assert len({chart.name for chart in CHARTS}) == len(CHARTS)


def _draws(chart: Chart, found: Recorded) -> bool:
    return any(panel.covers(found) for panel in chart.panels)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour, least", [(charts.TEXT, 4.0), *((c, 3.0) for c in (charts.OURS, *charts.COLOURS))])
def test_colours_stand_out_from_white_and_dark_pages(colour: str, least: float) -> None:
    """By the contrast of WCAG 2, which asks for 3 where something is large or a picture."""
    for page in charts.PAGES:
        darker, lighter = sorted((_luminance(colour), _luminance(page)))
        assert (lighter + 0.05) / (darker + 0.05) >= least


def test_pictures_hold_what_they_are_given(tmp_path: Path) -> None:
    charts.bars(
        [("top", [Group("group", [Bar("ours", 1.0, text="one"), Bar("peer", 2.0, 1.5, 2.5, "two")])])],
        tmp_path / "bars.svg",
        label="axis",
        logarithmic=True,
        against=1.0,
    )
    charts.curves([("left", [Curve("ours", [(1, 1), (1e6, 10)])])], tmp_path / "curves.svg", x_label="x", y_label="y")
    charts.stacks(
        [
            ("model", [Group("step", [Bar("convolutions", 3.0, text="10 ms"), Bar("rest", 7.0)])]),
            ("another", [Group("step", [Bar("products", 30.0, text="30 ms")])]),
        ],
        tmp_path / "stacks.svg",
        label="ms",
    )
    for name, texts in {
        "bars": ("top", "group", "one", "two", "axis"),
        "curves": ("left", "ours", "1M"),
        "stacks": ("model", "another", "step", "convolutions", "rest", "products", "10 ms", "30 ms"),
    }.items():
        picture = (tmp_path / f"{name}.svg").read_text()
        assert all(f">{text}<" in picture for text in texts), name


def test_machines_are_ordered_by_what_is_known_of_them() -> None:
    found = recorded.read([line("ours", device="B"), line("ours", device="A"), line("ours", device="A", row="b")])
    assert recorded.machines(found) == [Machine("A", 2, "avx2"), Machine("B", 2, "avx2")]
