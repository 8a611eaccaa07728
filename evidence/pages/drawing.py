"""Figures of claims: points gathered from records, drawn as SVG with reproducible bytes.

`python -m evidence.pages.drawing FILE.svg ...` adds the style for dark pages to figures of
matplotlib.
"""

from __future__ import annotations

import io
import itertools
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence.claims.claim import Claim, Figure
from evidence.claims.intervals import interval
from evidence.pages.numbers import SEEDS
from qat.utils.files import write_text

if TYPE_CHECKING:  # only drawing needs the heavy libraries
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from evidence.claims.records import Record
    from evidence.pages.evidence import Evidence

MARKERS = "osD^vP*X"
DASHES = ("--", ":", "-.")
LEVELS = 12
# Curves with at most this many points have markers and intervals.
FEW_POINTS = 13
_PANEL_INCHES = 3.3
# Number of letters that fit in the width of a figure, in label size, and in a panel's title.
_LETTERS = 92
_TITLE_LETTERS = 34
# Colours of light pages and their replacements on dark pages. Elements without a set colour, such
# as text, are black in an SVG.
_DARK = {
    "#000000": "#dde3ea",
    "#e6e6e6": "#3a4048",
    "#767676": "#9aa4af",
    "#0072b2": "#3f8fd2",
    "#56b4e9": "#b3e0fa",
}
_RULES = [
    f'[style*="{kind}: {light}"] {{{kind}: {dark} !important}}'
    for light, dark in _DARK.items()
    for kind in ("fill", "stroke")
]
DARK = " ".join((
    "svg {fill: #dde3ea}",
    '[style*="fill: #ffffff"] {fill: none !important}',
    *_RULES,
))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "qat",
    "font.family": "DejaVu Sans",
}


@dataclass(frozen=True)
class Point:
    """A metric of an arm.

    Attributes:
        x: position on the horizontal axis.
        values: value of the metric for each seed.
        name: label next to the point.
    """

    x: Any
    values: tuple[float, ...]
    name: str = ""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.mean(self.values)

    @property
    def half_interval(self) -> float:
        """Half of the 95 % interval; 0 for fewer than three seeds."""
        if len(self.values) < SEEDS:
            return 0.0
        ends = interval(self.values)
        return (ends[1] - ends[0]) / 2 if ends else 0.0


@dataclass(frozen=True)
class Gathered:
    """Content of a figure, by name: lists of `Point`s, or the record of a map.

    Names that have no runs are left out.
    """

    series: Mapping[str, Any]
    reference: Mapping[str, Point]


def gather(claim: Claim, figure: Figure, evidence: Evidence) -> Gathered:
    """Collect the content of a figure from records."""
    series: dict[str, Any] = {}
    for name, source in figure.series.items():
        content: Any
        if figure.kind == "map":
            content = _first_map(evidence.records(claim, source), figure.curve)
        elif figure.kind == "curves":
            content = _curve(evidence.records(claim, source), figure.curve or name)
        else:
            content = _points(claim, figure, source, evidence)
        if content:
            series[name] = content
    reference = {}
    for name, arm in figure.reference.items():
        values = evidence.values(claim, arm, figure.metric)
        if values:
            reference[name] = Point(None, tuple(values.values()))
    return Gathered(series, reference)


def _first_map(records: Sequence[Record], name: str) -> Record | None:
    """The first record with the map; a mean over seeds would be smoother than any single map."""
    for record in records:
        if name in record.maps:
            return record
    return None


def _curve(records: Sequence[Record], name: str) -> list[Point]:
    """Points at which all seeds have a value."""
    curves = []
    for record in records:
        points = record.curves.get(name, [])
        heights = {float(x): float(y) for x, y in points if x is not None and y is not None}
        if heights:
            curves.append(heights)
    if not curves:
        return []
    common = sorted(set(curves[0]).intersection(*curves[1:]))
    return [Point(x, tuple(heights[x] for heights in curves)) for x in common]


def _points(
    claim: Claim, figure: Figure, arms: Mapping[Any, str], evidence: Evidence
) -> list[Point]:
    """Points of lines or of a scatter; seconds become minutes."""
    unit = 60.0 if figure.along.endswith("seconds") else 1.0
    points = []
    for x, arm in arms.items():
        values = tuple(evidence.values(claim, arm, figure.metric).values())
        costs = tuple(evidence.values(claim, arm, figure.along).values())
        if values and costs:
            points.append(Point(statistics.mean(costs) / unit, values, x))
        elif values and not figure.along:
            points.append(Point(x, values))
    return points


def alt(figure: Figure, content: Gathered) -> str:
    """Alternative text of a figure."""
    height = figure.y or figure.curve or figure.metric
    axes = f"{height} over {figure.x}" if figure.x else height
    text = f"{axes}: {', '.join([*content.series, *content.reference])}"
    return " ".join(text.replace("[", "(").replace("]", ")").split())


def write(figure: Figure, content: Gathered, folder: Path) -> None:
    """Draw a figure as SVG into a folder."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(mpl.rcParamsDefault | STYLE), io.StringIO() as file:
        if figure.kind == "map":
            canvas = _maps(figure, content.series)
        else:
            canvas = _draw(figure, content)
        canvas.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        write_text(folder / figure.file, for_dark_pages(file.getvalue()))


def for_dark_pages(svg: str) -> str:
    """A figure of matplotlib with a style for dark pages: light text, a dark grid, paler blues."""
    head, tag, rest = svg.partition(" <defs>")
    return f"{head} <style>@media (prefers-color-scheme: dark) {{{DARK}}}</style>\n{tag}{rest}"


def _draw(figure: Figure, content: Gathered) -> Canvas:
    """Draw the series, horizontal lines for references, and a legend with references last."""
    from qat.analysis.analysis import GREY, panels

    canvas, (axis,) = panels(height=3.8)
    axis.set(xlabel=figure.x, ylabel=figure.y)
    draw = {"lines": _lines, "scatter": _scatter, "curves": _curves}[figure.kind]
    draw(axis, content.series)
    dashes = itertools.cycle(DASHES)
    for (name, point), dash in zip(content.reference.items(), dashes, strict=False):
        axis.axhline(
            point.mean,
            color=GREY,
            linestyle=dash,
            linewidth=1.2,
            label=f"{name}: {point.mean:.2f}",
            zorder=1,
        )
    handles, names = axis.get_legend_handles_labels()
    entries = dict(zip(names, handles, strict=True))
    labels = sorted(entries, key=lambda label: label not in content.series)
    columns = max(1, min(len(labels), _LETTERS // (max(map(len, labels)) + 8)))
    canvas.legend(
        [entries[label] for label in labels],
        labels,
        loc="outside upper left",
        ncols=columns,
        fontsize=8,
        frameon=False,
    )
    return canvas


def _bars(
    axis: Axes, number: int, points: Sequence[Point], xs: Sequence[float], **style: Any
) -> None:
    """Draw means and 95 % intervals, in the colour and with the marker of series `number`."""
    from qat.analysis.analysis import PALETTE

    style = {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "capsize": 3,
        **style,
    }
    means = []
    half_intervals = []
    for point in points:
        means.append(point.mean)
        half_intervals.append(point.half_interval)
    axis.errorbar(xs, means, yerr=half_intervals, **style)


def _lines(axis: Axes, series: Mapping[str, Sequence[Point]]) -> None:
    """Draw means at named or numbered positions, each with a dot for every seed next to it."""
    from qat.analysis.analysis import PALETTE

    all_points = itertools.chain.from_iterable(series.values())
    labels = list(dict.fromkeys(point.x for point in all_points))
    line: dict[str, Any] = {"linewidth": 1.4}
    try:
        numbers = list(map(float, labels))
    except ValueError:
        numbers = list(map(float, range(len(labels))))
        line = {"linestyle": "none"}
    step = min((b - a for a, b in itertools.pairwise(sorted(numbers))), default=1.0)
    positions = dict(sorted(zip(labels, numbers, strict=True), key=lambda item: item[1]))
    for number, (name, points) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * 0.06 * step
        xs = [positions[point.x] + shift for point in points]
        _bars(axis, number, points, xs, label=name, **line)
        for x, point in zip(xs, points, strict=True):
            if len(point.values) > 1:
                dots = [x + 0.025 * step] * len(point.values)
                color = PALETTE[number % len(PALETTE)]
                axis.plot(dots, point.values, ".", color=color, alpha=0.6)
    width = max(6, _LETTERS // len(positions))
    ticks = [textwrap.fill(str(label), width) for label in positions]
    axis.set_xticks(list(positions.values()), ticks)
    axis.margins(x=0.1)
    axis.grid(visible=False, axis="x")


def _scatter(axis: Axes, series: Mapping[str, Sequence[Point]]) -> None:
    """Draw means, joined in the order of their cost; points of the last series have labels."""
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.12, y=0.1)
    for number, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point.x)
        _bars(axis, number, points, [point.x for point in points], label=name, linewidth=1.4)
    for point in points:
        axis.annotate(
            point.name, (point.x, point.mean), (7, -9), textcoords="offset points", fontsize=8
        )


def _curves(axis: Axes, series: Mapping[str, Sequence[Point]]) -> None:
    """Draw the mean of each arm over pale lines of its seeds.

    Curves of few points also have markers and intervals.
    """
    from qat.analysis.analysis import PALETTE

    all_points = itertools.chain.from_iterable(series.values())
    positions = sorted({point.x for point in all_points})
    for number, (name, points) in enumerate(series.items()):
        color = PALETTE[number % len(PALETTE)]
        xs = [point.x for point in points]
        if len(points[0].values) > 1:
            values = [point.values for point in points]
            axis.plot(xs, values, color=color, linewidth=0.8, alpha=0.35)
        axis.plot(xs, [point.mean for point in points], color=color, linewidth=1.8, label=name)
        if len(positions) <= FEW_POINTS:
            _bars(axis, number, points, xs, linestyle="none")
    if len(positions) <= FEW_POINTS:
        axis.set_xticks(positions, [f"{x:g}" for x in positions])


def _maps(figure: Figure, series: Mapping[str, Record]) -> Canvas:
    """Draw filled contours side by side.

    Each map has its own scale: on the scale of a higher map, a lower one would look smooth.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from qat.analysis.analysis import SEQUENTIAL_COLORMAP, panels

    width = _PANEL_INCHES * len(series)
    canvas, axes = panels(1, len(series), width=width, height=0.85 * _PANEL_INCHES)
    for axis, (name, record) in zip(axes, series.items(), strict=True):
        plane = record.maps[figure.curve]
        points = plane["x"], plane["y"], np.array(plane["z"], dtype=float)
        filled = axis.contourf(*points, levels=LEVELS, cmap=SEQUENTIAL_COLORMAP)
        axis.contour(*points, levels=LEVELS, colors="black", linewidths=0.4)
        axis.set_title(textwrap.fill(name, _TITLE_LETTERS), fontsize=9, loc="left")
        axis.set_xlabel(figure.x, fontsize=9)
        axis.set_ylabel(figure.y, fontsize=9)
        axis.locator_params(nbins=5)
        axis.grid(visible=False)
        bar = canvas.colorbar(filled, ax=axis, shrink=0.8, ticks=MaxNLocator(5))
        bar.ax.tick_params(labelsize=7)
        bar.set_label(f"{figure.curve}, seed {record.seed}", fontsize=8)
    return canvas


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_text(Path(name), for_dark_pages(Path(name).read_text(encoding="utf-8")))
