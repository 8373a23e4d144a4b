"""``docs/performance.md`` from the results in ``bench/results``: ``python -m bench.performance``, or ``make report``.

Only the newest run of a comparison on a machine counts, machines are never mixed, and a figure is shown only if its
result was found right in that run. All figures are in ``docs/performance/tables.md``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from . import charts, recorded
from .catalogue import CHARTS, NOT_RUN, OTHER, Chart, Panel
from .charts import Bar, Curve, Group
from .goals import TARGETS, Target
from .recorded import Machine, Measurement, Ratio, Recorded

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = "performance"
DISTURBED = " (*)"


def write(results: Path = recorded.RESULTS, docs: Path = DOCS) -> list[Path]:
    """Writes the page, its tables and its pictures, and returns where they are."""
    comparisons = recorded.newest(recorded.read_all(results))
    pictures = docs / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for stale in pictures.glob("*.svg"):
        stale.unlink()
    page = [*_introduction(comparisons), *_goals(comparisons)]
    for machine in recorded.machines(comparisons):
        page += _machine(machine, [found for found in comparisons if found.machine == machine], pictures)
    page += ["## Not run", "", *(f"- {peer}: {reason}." for peer, reason in NOT_RUN.items()), ""]
    written = [docs / "performance.md", pictures / "tables.md"]
    written[0].write_text("\n".join(page))
    written[1].write_text("\n".join(_tables(comparisons)))
    return [*written, *sorted(pictures.glob("*.svg"))]


def judge(target: Target, comparisons: Sequence[Recorded]) -> tuple[str, str]:
    """What was measured for a goal, and the verdict: met, missed, or undecided where only disturbed runs exist."""
    found: list[tuple[Ratio, str, bool]] = []
    for comparison in comparisons:
        for goal in target.goals:
            ratio = comparison.ratio(goal.numerator, goal.denominator)
            if ratio is not None:
                where = f"{goal.numerator} / {goal.denominator}: {_short(comparison)}"
                found.append((ratio, where, goal.is_met(ratio.value)))
    if not found:
        return "", "not measured"
    relied_upon = [entry for entry in found if not entry[0].disturbed]
    is_upper = target.goals[0].at_most is not None
    ratio, where, _ = sorted(relied_upon or found, key=lambda entry: entry[0].value)[-1 if is_upper else 0]
    figure = _ratio_text(ratio) + (f", {where}" if len(found) > 1 else "")
    if not relied_upon:
        return figure, "undecided: other processes took the cores"
    met = sum(is_met for *_, is_met in relied_upon)
    if met == len(relied_upon):
        return figure, "met"
    return figure, "missed" if met == 0 else f"missed, met in {met} of {len(relied_upon)}"


def _introduction(comparisons: Sequence[Recorded]) -> list[str]:
    lines = [
        "# Performance",
        "",
        "Made by `make report` from `bench/results/*.jsonl`, which `make bench` appends to. Nothing here is written by "
        "hand except the reasons in the table of goals (`bench/goals.py`).",
        "",
        "How figures come about: all ways to compute a thing take turns in one process, round after round, on the same "
        "data, and each result is checked before it is timed, against one in float64 (whole models: against that of "
        "the published code); a wrong one gets no figure. A time is the median of all calls, a ratio that of two "
        "medians of one run, with the quartiles of the rounds' ratios. Memory is counted at the allocator, not timed. "
        f"Freed memory is kept for the next call, for all alike, except where a title says otherwise.{DISTURBED} marks "
        "figures during which other processes took the cores: not to be relied upon. All figures, with medians, "
        "quartiles, types, threads and commits, are in [tables.md](performance/tables.md).",
        "",
        "| machine | threads | figures | PyTorch | commits | dates |",
        "|---|---|---|---|---|---|",
    ]
    for machine in recorded.machines(comparisons):
        own = [found for found in comparisons if found.machine == machine]
        cells = [
            str(machine),
            _listed(str(found.threads) for found in own),
            str(sum(len(found.shown) for found in own)),
            _listed(found.torch for found in own),
            _listed(f"`{found.commit}`" for found in own),
            _listed(found.date for found in own),
        ]
        lines.append(_line(cells))
    return [*lines, ""]


def _goals(comparisons: Sequence[Recorded]) -> list[str]:
    lines = [
        "## Goals",
        "",
        "Where a goal is about several comparisons the worst one is shown. Ratios are of times, or of memory.",
        "",
        "| what | goal | figure | machine, threads | verdict | reason |",
        "|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        covered = [found for found in comparisons if target.covers(found)]
        rows = []
        for machine in recorded.machines(covered):
            for threads in sorted({found.threads for found in covered if found.machine == machine}):
                own = [found for found in covered if (found.machine, found.threads) == (machine, threads)]
                figure, verdict = judge(target, own)
                if figure:
                    missed = verdict.startswith("missed")
                    reason = (target.reason or "not found out yet") if missed else ""
                    rows.append([_bound(target), figure, f"{machine}, {threads}", verdict, reason])
        rows = rows or [[_bound(target), "", "", "not measured", target.unmeasured]]
        lines += [_line([target.measure, *row]) for row in rows]
    return [*lines, ""]


def _machine(machine: Machine, comparisons: Sequence[Recorded], pictures: Path) -> list[str]:
    lines = [f"## {machine}", ""]
    threads = statistics.mode(found.threads for found in comparisons)
    missing = []
    for chart in CHARTS:
        name = f"{machine.slug}-{chart.name}.svg"
        own = [found for found in comparisons if found.threads == threads or chart.name == "threads"]
        sources = _draw(chart, own, pictures / name)
        if not sources:
            missing.append(chart.title)
            continue
        ran = (
            f"threads: {_listed(str(found.threads) for found in sources)}; PyTorch "
            f"{_listed(found.torch for found in sources)}, commit {_listed(f'`{found.commit}`' for found in sources)}, "
            f"{_listed(found.date for found in sources)}"
        )
        lines += [f"### {chart.title}", "", f"{chart.text} ({ran})", ""]
        lines += [f"![{chart.title.replace('`', '')}, {machine}]({PICTURES}/{name})", ""]
        lines += _problems(sources)
    if missing:
        lines += [f"Not measured on this machine: {'; '.join(missing)}.", ""]
    return lines


def _draw(chart: Chart, comparisons: Sequence[Recorded], path: Path) -> list[Recorded]:
    """Draws what there is and returns what was drawn."""
    panels, sources = [], []
    for panel in chart.panels:
        found = [comparison for comparison in comparisons if panel.covers(comparison)]
        content = _content(chart, panel, found)
        if content:
            panels.append((panel.title, content))
            sources += found
    if not panels:
        return []
    unit = sources[0].unit
    if chart.kind == "growth":
        charts.curves(panels, path, x_label=chart.axis, y_label=unit)
    elif chart.kind == "parts":
        charts.stacks(_without_small_parts(_split(panels)), path, label=unit)
    elif chart.kind == "ratios":
        charts.bars(panels, path, label="time as a multiple of ours", logarithmic=True, against=1.0)
    elif chart.kind == "floor":
        whole = [("", [group for _, groups in panels for group in groups])]
        charts.bars(whole, path, label="% of our time", against=100.0, one_colour=True)
    else:
        charts.bars(panels, path, label=unit)
    return sources


def _split(panels: Sequence[tuple[str, Sequence[Group]]]) -> list[tuple[str, list[Group]]]:
    """Panels of the rows that begin alike: "ADE20K, before" becomes the bar "before" of the panel "..., ADE20K"."""
    split: dict[str, list[Group]] = {}
    for title, groups in panels:
        for group in groups:
            beginning, _, name = group.name.rpartition(", ")
            split.setdefault(f"{title}, {beginning}", []).append(replace(group, name=name))
    return list(split.items())


_SMALL = 0.03  # of a whole


def _without_small_parts(panels: Sequence[tuple[str, Sequence[Group]]]) -> list[tuple[str, list[Group]]]:
    """Puts the parts that are small wherever they occur with the others, the largest first."""
    largest: dict[str, float] = {}
    for _, groups in panels:
        for group in groups:
            whole = sum(bar.value for bar in group.bars)
            for bar in group.bars:
                largest[bar.name] = max(largest.get(bar.name, 0.0), bar.value / whole)

    def merged(group: Group) -> Group:
        shown = [bar for bar in group.bars if bar.name != OTHER and largest[bar.name] >= _SMALL]
        rest = sum(bar.value for bar in group.bars) - sum(bar.value for bar in shown)
        order = sorted(shown, key=lambda bar: -largest[bar.name])
        return replace(group, bars=[*order, Bar(OTHER, rest, text=group.bars[0].text)])

    return [(title, [merged(group) for group in groups]) for title, groups in panels]


def _content(chart: Chart, panel: Panel, found: Sequence[Recorded]) -> list[Group] | list[Curve]:
    if chart.kind == "growth":
        return _growth(found)
    if chart.kind == "floor":
        shares = [bar for comparison in found if (bar := _share(panel, comparison))]
        return [Group(panel.title, shares)] if shares else []
    groups = []
    for comparison in found:
        shown = {name: entry for name, entry in comparison.shown.items() if name not in chart.left_out}
        if chart.kind == "ratios":
            bars = [bar for name in shown if name != comparison.base and (bar := _ratio_bar(comparison, name))]
            first = comparison.shown.get(comparison.base)
            name = f"{_row(chart, comparison)}: {comparison.base} {_time(first, comparison)}" if first else ""
        else:
            bars = [_value_bar(entry, comparison.unit) for entry in shown.values()]
            name = comparison.row
            if chart.kind == "parts":
                total = f"{_number(sum(bar.value for bar in bars))} {comparison.unit}"
                bars = [replace(bar, text=total) for bar in bars]
        if bars:
            groups.append(Group(name, bars))
    return groups


def _row(chart: Chart, comparison: Recorded) -> str:
    if chart.name != "threads":
        return comparison.row
    return f"{comparison.table.split(': ')[0].removeprefix('Threads, ')}, {comparison.row}"


def _growth(found: Sequence[Recorded]) -> list[Curve]:
    names = dict.fromkeys(name for comparison in found for name in comparison.shown)
    curves = []
    for name in names:
        points = [
            (float(comparison.row.split()[0].replace(",", "")), entry.median)
            for comparison in found
            if (entry := comparison.shown.get(name)) and entry.median is not None
        ]
        curves.append(Curve(name, sorted(points)))
    return curves


def _share(panel: Panel, comparison: Recorded) -> Bar | None:
    ratio = comparison.ratio(panel.floor, panel.ours)
    if ratio is None:
        return None
    share = 100 * panel.copies * ratio.value
    return Bar(comparison.row, share, text=f"{share:.0f}%{DISTURBED if ratio.disturbed else ''}")


def _ratio_bar(comparison: Recorded, name: str) -> Bar | None:
    ratio = comparison.ratio(name, comparison.base)
    if ratio is None:
        return None
    text = f"{_number(ratio.value)}x{DISTURBED if ratio.disturbed else ''}"
    return Bar(name, ratio.value, ratio.lower, ratio.upper, text)


def _value_bar(entry: Measurement, unit: str) -> Bar:
    assert entry.median is not None
    text = f"{_number(entry.median)} {unit}{DISTURBED if entry.disturbed else ''}"
    return Bar(entry.name, entry.median, *entry.quartiles, text)


def _problems(comparisons: Sequence[Recorded]) -> list[str]:
    """Who is not in a picture, and why."""
    taking_part: dict[str, list[Recorded]] = {}
    missing: dict[tuple[str, str], list[Recorded]] = {}
    for comparison in comparisons:
        for entry in comparison.measurements.values():
            taking_part.setdefault(entry.name, []).append(comparison)
            if entry.name not in comparison.shown:
                missing.setdefault((entry.name, entry.problem or "was not checked"), []).append(comparison)
    lines = [
        f"- Not shown: `{name}` {problem}, {'everywhere' if where == taking_part[name] else 'in ' + _places(where)}."
        for (name, problem), where in missing.items()
    ]
    return [*lines, ""] if lines else []


def _places(comparisons: Sequence[Recorded]) -> str:
    """Enough to find them in the tables: the title of each table once, then its rows."""
    rows: dict[str, list[str]] = {}
    for comparison in comparisons:
        rows.setdefault(comparison.table.split(":")[0], []).append(comparison.row)
    return ", ".join(f"{title} ({'; '.join(own)})" for title, own in rows.items())


def _tables(comparisons: Sequence[Recorded]) -> list[str]:
    lines = [
        "# All figures of the report",
        "",
        "The first contender: median (quartiles). The others: their median as a multiple of its median, with the "
        f"quartiles of the rounds' ratios.{DISTURBED}: other processes took the cores.",
        "",
    ]
    for machine in recorded.machines(comparisons):
        lines += [f"## {machine}", ""]
        own = [found for found in comparisons if found.machine == machine]
        for title, dtype in dict.fromkeys((found.table, found.dtype) for found in own):
            rows = [found for found in own if (found.table, found.dtype) == (title, dtype)]
            names = list(dict.fromkeys(name for found in rows for name in found.measurements))
            header = ["", "threads", "allocator", "commit", "date", *names]
            lines += [f"### {title} ({dtype}, {rows[0].unit})", "", _line(header), _line(["---"] * len(header))]
            for found in rows:
                cells = [_cell(found, name) for name in names]
                lines.append(
                    _line([found.row, str(found.threads), found.allocator, f"`{found.commit}`", found.date, *cells])
                )
            lines.append("")
    return lines


def _cell(comparison: Recorded, name: str) -> str:
    entry = comparison.measurements.get(name)
    if entry is None:
        return ""
    if name not in comparison.shown:
        return entry.problem or "not checked"
    ratio = comparison.ratio(name, comparison.base)
    if name != comparison.base and ratio is not None:
        return _ratio_text(ratio)
    lower, upper = entry.quartiles
    spread = f" ({_number(lower)} to {_number(upper)})" if lower is not None and upper is not None else ""
    return f"{_time(entry, comparison)}{spread}{DISTURBED if entry.disturbed else ''}"


def _time(entry: Measurement, comparison: Recorded) -> str:
    assert entry.median is not None
    return f"{_number(entry.median)} {comparison.unit}"


def _bound(target: Target) -> str:
    if not target.goals:
        return ""
    tops = " or ".join(dict.fromkeys(goal.numerator for goal in target.goals))
    bottoms = " or ".join(dict.fromkeys(goal.denominator for goal in target.goals))
    return f"{tops} / {bottoms} {target.goals[0].wanted}"


def _short(comparison: Recorded) -> str:
    """Enough to find it in the tables."""
    return f"{comparison.table.split(':')[0]}, {comparison.row}"


def _ratio_text(ratio: Ratio) -> str:
    spread = "" if ratio.lower is None or ratio.upper is None else f" ({ratio.lower:.3g} to {ratio.upper:.3g})"
    return f"{ratio.value:.3g}x{spread}{DISTURBED if ratio.disturbed else ''}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    for path in write():
        print(path.relative_to(DOCS.parent))
