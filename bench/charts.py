"""The pictures of the report: one style, readable on a white page and on a dark one.

The background is transparent and every colour is of middle lightness, so that it stands out from both; one file serves
both. The same figures give the same file, byte for byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

TEXT = "#757b82"
OURS = "#2f81d7"
COLOURS = ("#c96a16", "#2b9a66", "#a167d9", "#d84a5a", "#1b93a3", "#96812a", "#c355a5", "#7d8288", "#5f72e0", "#b5714d")
PAGES = ("#ffffff", "#0d1117")
_WIDTH = 7.6
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 8.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sca-kernels",  # the same names of elements in every run
    "text.color": TEXT,
    "axes.facecolor": "none",
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Bar:
    """A bar with what its spread is, and the text at its end."""

    name: str
    value: float
    lower: float | None = None
    upper: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Group:
    """Bars that belong together."""

    name: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in ascending order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def bars(
    panels: Sequence[tuple[str, Sequence[Group]]],
    path: Path,
    *,
    label: str,
    against: float | None = None,
    logarithmic: bool = False,
    one_colour: bool = False,
) -> None:
    """Horizontal bars in one panel below the other, with a dashed line at the value they are held ``against``.

    On a logarithmic axis bars begin at that value. Groups of one bar, always of the same name, become one row each.
    """
    with pyplot.style.context(_STYLE):
        names = {bar.name for _, groups in panels for group in groups for bar in group.bars}
        if len(names) == 1:
            (name,) = names
            label = f"{name}, {label}"
            panels = [(title, [_as_one_row(groups)]) for title, groups in panels]
        heights = [sum(len(group.bars) + (1.3 if group.name else 0.2) for group in groups) for _, groups in panels]
        inches = 0.18 * sum(heights) + 0.5 * len(panels) + 0.2
        figure, all_axes = pyplot.subplots(
            len(panels),
            1,
            figsize=(_WIDTH, inches),
            height_ratios=heights,
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        colours = _colours([bar.name for _, groups in panels for group in groups for bar in group.bars])
        if one_colour or len(names) == 1:
            colours = dict.fromkeys(colours, OURS if one_colour else COLOURS[0])
        for (title, groups), axes in zip(panels, all_axes[:, 0], strict=True):
            if title:
                axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=8)
            if logarithmic:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
                axes.xaxis.set_major_formatter(FuncFormatter(_plain))
                axes.xaxis.set_minor_formatter(NullFormatter())
            _draw_groups(axes, groups, colours, start=against if logarithmic and against else 0.0)
            if against is not None:
                axes.axvline(against, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.margins(x=0.12, y=0.01)
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labelbottom=True)
        all_axes[-1, 0].set_xlabel(label)
        _save(figure, path)


def stacks(panels: Sequence[tuple[str, Sequence[Group]]], path: Path, *, label: str) -> None:
    """One horizontal bar per group, made of its parts; each panel has a scale of its own."""
    with pyplot.style.context(_STYLE):
        names = list(dict.fromkeys(bar.name for _, groups in panels for group in groups for bar in group.bars))
        colours = dict(zip(names, itertools.cycle((OURS, *COLOURS))))
        rows = sum(len(groups) for _, groups in panels)
        height = 0.32 * rows + 0.62 * len(panels) + 0.22 * (len(names) // 3 + 1)
        figure, all_axes = pyplot.subplots(
            len(panels), 1, figsize=(_WIDTH, height), squeeze=False, layout="constrained",
            height_ratios=[len(groups) + 1 for _, groups in panels],
        )  # fmt: skip
        for (title, groups), axes in zip(panels, all_axes[:, 0], strict=True):
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
            for place, group in enumerate(groups):
                left = 0.0
                for bar in group.bars:
                    axes.barh(-place, bar.value, left=left, height=0.62, color=colours[bar.name], label=bar.name)
                    left += bar.value
                total = group.bars[0].text if group.bars else ""
                axes.annotate(total, (left, -place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set_yticks([-place for place in range(len(groups))], [group.name for group in groups])
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.12)
        all_axes[-1, 0].set_xlabel(label)
        patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=patches, loc="outside upper left", ncols=3, fontsize=8)
        _save(figure, path)


def curves(panels: Sequence[tuple[str, Sequence[Curve]]], path: Path, *, x_label: str, y_label: str) -> None:
    """Curves on logarithmic axes, panels side by side, each curve named at its end."""
    with pyplot.style.context(_STYLE):
        figure, all_axes = pyplot.subplots(
            1, len(panels), figsize=(_WIDTH, 2.9), squeeze=False, sharey=True, layout="constrained"
        )
        colours = _colours([curve.name for _, drawn in panels for curve in drawn])
        for (title, drawn), axes in zip(panels, all_axes[0], strict=True):
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
            axes.set_xscale("log")
            axes.set_yscale("log")
            for curve in drawn:
                horizontal, vertical = zip(*curve.points, strict=True)
                is_ours = curve.name.startswith("ours")
                axes.plot(
                    horizontal,
                    vertical,
                    color=colours[curve.name],
                    linewidth=2.0 if is_ours else 1.4,
                    marker="o",
                    markersize=3.5,
                    label=curve.name,
                )
            ticks = sorted({x for curve in drawn for x, _ in curve.points})
            axes.set_xticks(ticks, [_plain(tick) for tick in ticks], rotation=45, ha="right")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(x_label)
        all_axes[0, 0].set_ylabel(y_label)
        handles = {}
        for axes in all_axes[0]:
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(name, handle)
        figure.legend(handles.values(), handles, loc="outside upper left", ncols=6, fontsize=8)
        _save(figure, path)


def _as_one_row(groups: Sequence[Group]) -> Group:
    """Groups of one bar each as the bars of one group without a name."""
    return Group("", [replace(bar, name=group.name) for group in groups for bar in group.bars])


def _draw_groups(axes: Axes, groups: Sequence[Group], colours: dict[str, str], start: float) -> None:
    place, places, names = 0.0, [], []
    for group in groups:
        if group.name:
            place -= 0.3
            at_left = axes.get_yaxis_transform()
            axes.text(-0.01, place, group.name, transform=at_left, ha="right", va="center", fontweight="bold")
            place -= 1
        for bar in group.bars:
            colour = colours.get(bar.name, COLOURS[0])
            axes.barh(place, bar.value - start, left=start, height=0.72, color=colour)
            if bar.lower is not None and bar.upper is not None:
                axes.plot((bar.lower, bar.upper), (place, place), color=TEXT, linewidth=0.9)
            end = max(bar.value, bar.upper or 0.0, start)
            axes.annotate(bar.text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            places.append(place)
            names.append(bar.name)
            place -= 1
    axes.set_yticks(places, names)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Ours in its own colour, the others in the order in which they occur."""
    others = [name for name in dict.fromkeys(names) if name != "ours"]
    return {"ours": OURS, **{name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}}


def _plain(value: float, _position: object = None) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if value >= 1e4 else f"{value:.4g}"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)
