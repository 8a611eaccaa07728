"""What a figure of a claim shows: points with their seeds, gathered from records, and drawn as files that are the same bytes each time.

`python -m evidence.pages.drawing FILE.svg ...` gives figures of matplotlib the style for dark pages that these have.
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
from qat.utils.files import write_text

if TYPE_CHECKING:  # the heavy libraries are for pictures alone
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from evidence.pages.page import Evidence

MARKERS, DASHES, LEVELS = "osD^vP*X", ("--", ":", "-."), 12
# Places of a curve up to which each is worth a mark.
FEW = 13
_PANEL_INCHES = 3.3
# How many letters of the size of labels go into the width of a figure, and into the title of a panel.
_LETTERS, _TITLE_LETTERS = 92, 34
# Colours on dark pages: a light one and what it becomes there. What has no colour of its own, such as text, is black in an SVG.
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
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "qat",
    "font.family": "DejaVu Sans",
}


@dataclass(frozen=True)
class Point:
    """A metric of one arm: the values of its seeds; `name` is written beside it."""

    x: Any
    values: tuple[float, ...]
    name: str = ""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.values)

    @property
    def around(self) -> float:
        """Half of the 95 % interval; nothing below three seeds."""
        ends = interval(self.values) if len(self.values) > 2 else None  # noqa: PLR2004
        return (ends[1] - ends[0]) / 2 if ends else 0.0


@dataclass(frozen=True)
class Gathered:
    """What there is to draw, by name: `Point`s, of a map its record; names without any run are left out."""

    series: Mapping[str, Any]
    reference: Mapping[str, Point]


def gather(claim: Claim, figure: Figure, evidence: Evidence) -> Gathered:
    """From the records."""
    series: dict[str, Any] = {}
    unit = 60.0 if figure.along.endswith("seconds") else 1.0  # minutes
    for name, shown in figure.series.items():
        found: Any = []
        if (
            figure.kind == "map"
        ):  # of the first seed that has it: the mean of maps would be smoother than each
            found = next(
                (
                    record
                    for record in evidence.records(claim, shown)
                    if figure.curve in record.maps
                ),
                None,
            )
        elif figure.kind == "curves":
            curves = [
                record.curves.get(figure.curve, []) for record in evidence.records(claim, shown)
            ]
            seeds = [
                seed
                for points in curves
                if (seed := {float(x): float(y) for x, y in points if None not in {x, y}})
            ]
            places = sorted(set(seeds[0]).intersection(*seeds[1:])) if seeds else ()
            found = [Point(x, tuple(seed[x] for seed in seeds)) for x in places]
        else:
            for x, arm in shown.items():
                values, costs = (
                    tuple(evidence.values(claim, arm, metric).values())
                    for metric in (figure.metric, figure.along)
                )
                if values and (costs or not figure.along):
                    found.append(
                        Point(statistics.mean(costs) / unit, values, x)
                        if costs
                        else Point(x, values)
                    )
        if found:
            series[name] = found
    across = {
        name: tuple(evidence.values(claim, arm, figure.metric).values())
        for name, arm in figure.reference.items()
    }
    return Gathered(
        series, {name: Point(None, values) for name, values in across.items() if values}
    )


def alt(figure: Figure, found: Gathered) -> str:
    """What a figure shows, for those who do not see it."""
    over = " over ".join(
        text for text in (figure.y or figure.curve or figure.metric, figure.x) if text
    )
    return " ".join(
        f"{over}: {', '.join([*found.series, *found.reference])}"
        .replace("[", "(")
        .replace("]", ")")
        .split()
    )


def write(of: Figure, found: Gathered, folder: Path) -> None:
    """Draw a figure as SVG into a folder."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(mpl.rcParamsDefault | _STYLE), io.StringIO() as file:
        canvas = _maps(of, found.series) if of.kind == "map" else _draw(of, found)
        canvas.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        write_text(folder / of.file, for_dark_pages(file.getvalue()))


def for_dark_pages(svg: str) -> str:
    """A figure of matplotlib with a style for dark pages: black becomes light, the grid dark, dark blue paler."""
    head, tag, rest = svg.partition(" <defs>")
    return f"{head} <style>@media (prefers-color-scheme: dark) {{{DARK}}}</style>\n{tag}{rest}"


def _draw(of: Figure, found: Gathered) -> Canvas:
    """The series, other arms as lines across, and a legend above in as many columns as there is room for, references last."""
    from qat.analysis.analysis import GREY, panels

    canvas, (axis,) = panels(height=3.8)
    axis.set(xlabel=of.x, ylabel=of.y)
    {"lines": _lines, "scatter": _scatter, "curves": _curves}[of.kind](axis, found.series)
    for (name, point), dash in zip(found.reference.items(), itertools.cycle(DASHES), strict=False):
        axis.axhline(
            point.mean,
            color=GREY,
            linestyle=dash,
            linewidth=1.2,
            label=f"{name}: {point.mean:.2f}",
            zorder=1,
        )
    entries = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = sorted(entries, key=lambda label: label not in found.series)
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
    axis: Axes, number: int, points: Sequence[Point], xs: Sequence[float], **look: Any
) -> None:
    """Means with their 95 % intervals, in the colour and with the marker of the series' number."""
    from qat.analysis.analysis import PALETTE

    look = {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "capsize": 3,
        **look,
    }
    axis.errorbar(
        xs, [point.mean for point in points], yerr=[point.around for point in points], **look
    )


def _lines(axis: Axes, series: Mapping[str, Sequence[Point]]) -> None:
    """Means over places, a dot for every seed beside them."""
    from qat.analysis.analysis import PALETTE

    named = list(dict.fromkeys(point.x for points in series.values() for point in points))
    try:
        numbers = [float(x) for x in named]
        line = {"linewidth": 1.4}
    except ValueError:
        numbers, line = [float(i) for i in range(len(named))], {"linestyle": "none"}
    step = min((b - a for a, b in itertools.pairwise(sorted(numbers))), default=1.0)
    places = dict(sorted(zip(named, numbers, strict=True), key=lambda item: item[1]))
    for number, (name, points) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * 0.06 * step
        xs = [places[point.x] + shift for point in points]
        _bars(axis, number, points, xs, label=name, **line)
        for x, point in zip(xs, points, strict=True):
            if len(point.values) > 1:
                axis.plot(
                    [x + 0.025 * step] * len(point.values),
                    point.values,
                    ".",
                    color=PALETTE[number % len(PALETTE)],
                    alpha=0.6,
                )
    axis.set_xticks(
        list(places.values()),
        [textwrap.fill(str(x), max(6, _LETTERS // len(places))) for x in places],
    )
    axis.margins(x=0.1)
    axis.grid(visible=False, axis="x")


def _scatter(axis: Axes, series: Mapping[str, Sequence[Point]]) -> None:
    """Means joined in the order of their cost; the last series says what its points are."""
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
    """The mean of every arm, over its seeds, which are pale; of a few places with marks and intervals."""
    from qat.analysis.analysis import PALETTE

    places = sorted({point.x for points in series.values() for point in points})
    for number, (name, points) in enumerate(series.items()):
        color, xs = PALETTE[number % len(PALETTE)], [point.x for point in points]
        if len(points[0].values) > 1:
            axis.plot(
                xs, [point.values for point in points], color=color, linewidth=0.8, alpha=0.35
            )
        axis.plot(xs, [point.mean for point in points], color=color, linewidth=1.8, label=name)
        if len(places) <= FEW:
            _bars(axis, number, points, xs, linestyle="none")
    if len(places) <= FEW:
        axis.set_xticks(places, [f"{x:g}" for x in places])


def _maps(of: Figure, series: Mapping[str, Any]) -> Canvas:
    """Filled contours side by side, each on a scale of its own: how rugged one is would not be seen on that of a higher one."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from qat.analysis.analysis import HEAT, panels

    canvas, axes = panels(
        1, len(series), width=_PANEL_INCHES * len(series), height=0.85 * _PANEL_INCHES
    )
    for axis, (name, record) in zip(axes, series.items(), strict=True):
        plane = record.maps[of.curve]
        given = plane["x"], plane["y"], np.array(plane["z"], dtype=float)
        filled = axis.contourf(*given, levels=LEVELS, cmap=HEAT)
        axis.contour(*given, levels=LEVELS, colors="black", linewidths=0.4)
        axis.set_title(textwrap.fill(name, _TITLE_LETTERS), fontsize=9, loc="left")
        axis.set_xlabel(of.x, fontsize=9)
        axis.set_ylabel(of.y, fontsize=9)
        axis.locator_params(nbins=5)
        axis.grid(visible=False)
        bar = canvas.colorbar(filled, ax=axis, shrink=0.8, ticks=MaxNLocator(5))
        bar.ax.tick_params(labelsize=7)
        bar.set_label(f"{of.curve}, seed {record.seed}", fontsize=8)
    return canvas


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_text(Path(name), for_dark_pages(Path(name).read_text(encoding="utf-8")))
