"""Figures drawn from gathered points, as files that are the same bytes each time."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from qat.analysis.style import GREY, HEAT, PALETTE, axes, figure, panels
from qat.utils.files import replacing
from studies.claims import Figure
from studies.figures import Course, Gathered, Map, Point
from studies.numbers import spread

MARKERS = "osD^vP*X"
DASHES = ("--", ":", "-.")
COLUMNS = 3
LEVELS = 12
# A range of places along x so wide that the smaller ones would lie on each other.
LOG_FROM = 30
# Places of a curve up to which each is worth a mark.
FEW = 13
_BAR_INCHES, _PANEL_INCHES = 0.42, 3.3
# How many letters of the size of labels go into the width of a figure, and into the title of a panel.
_LETTERS, _TITLE_LETTERS = 92, 34
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
_STYLE: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "qat", "font.family": "DejaVu Sans"}


def save(of: Figure, found: Gathered, path: Path) -> None:
    """Draw and write, whole or not at all."""
    with mpl.rc_context(mpl.rcParamsDefault | _STYLE), replacing(path) as temporary:
        canvas = draw(of, found)
        canvas.savefig(temporary, format=path.suffix[1:], metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def draw(of: Figure, found: Gathered) -> Canvas:
    """The picture."""
    return {"lines": _draw_lines, "bars": _draw_bars, "curves": _draw_curves, "map": _draw_maps}[of.kind](of, found)


def _draw_lines(of: Figure, found: Gathered) -> Canvas:
    """Means with their deviation over places, a dot for every seed beside them."""
    canvas = figure(height=3.8)
    axis = axes(canvas, of.x, of.y)
    places = _places(found.series)
    is_ordered = all(_number(x) is not None for x in places)
    step = _step(list(places.values()))
    for number, (name, points) in enumerate(found.series.items()):
        shift = (number - (len(found.series) - 1) / 2) * 0.06 * step
        xs = [places[point.x] + shift for point in points]
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        line = {"linewidth": 1.4} if is_ordered else {"linestyle": "none"}
        means, around = [point.mean for point in points], [point.around for point in points]
        axis.errorbar(xs, means, yerr=around, color=color, marker=marker, markersize=5, capsize=3, label=name, **line)
        _dots(
            axis,
            [(x + 0.025 * step, value) for x, point in zip(xs, points, strict=True) for value in point.values if len(point.values) > 1],
            color,
        )
    _name_places(axis, places)
    _references(axis, found.reference, axis.axhline)
    _legend(canvas, found)
    return canvas


def _places(series: Mapping[str, Sequence[Point]]) -> dict[object, float]:
    """Where each x lies: numbers at their value, on a logarithmic axis at their decade, others one behind the other."""
    named = dict.fromkeys(point.x for points in series.values() for point in points)
    numbers = {x: _number(x) for x in named}
    if any(value is None for value in numbers.values()):
        return {x: float(number) for number, x in enumerate(named)}
    found = {x: value for x, value in sorted(numbers.items(), key=lambda item: item[1] or 0.0) if value is not None}
    low, high = min(found.values()), max(found.values())
    return {x: math.log10(value) for x, value in found.items()} if low > 0 and high / low >= LOG_FROM else found


def _number(x: object) -> float | None:
    """YAML takes 1e-4 for a text."""
    try:
        return float(str(x))
    except ValueError:
        return None


def _step(places: Sequence[float]) -> float:
    """The smallest distance of two neighbours."""
    return min((abs(b - a) for a, b in itertools.pairwise(sorted(set(places)))), default=1.0)


def _name_places(axis: Axes, places: Mapping[object, float]) -> None:
    letters = max(6, _LETTERS // len(places))
    axis.set_xticks(list(places.values()), [textwrap.fill(str(x), letters) for x in places])
    margin = 0.25 * _step(list(places.values()))
    axis.set_xlim(min(places.values()) - margin, max(places.values()) + margin)
    axis.grid(visible=False, axis="x")


def _dots(axis: Axes, points: Sequence[tuple[float, float]], color: str) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, linestyle="none", marker="o", markersize=3.2, color=color, alpha=0.6, markeredgewidth=0)


def _references(axis: Axes, reference: Mapping[str, Point], line: object) -> None:
    """Means of other arms, across."""
    for (name, point), dash in zip(reference.items(), itertools.cycle(DASHES), strict=False):
        line(point.mean, color=GREY, linestyle=dash, linewidth=1.2, label=f"{name} {spread(point.values)}", zorder=1)  # type: ignore[operator]


def _legend(canvas: Canvas, found: Gathered) -> None:
    """Above the axes, in as many columns as there is room for; references last."""
    entries = dict(zip(*reversed(canvas.axes[0].get_legend_handles_labels()), strict=True))
    labels = [label for label in entries if label in found.series] + [label for label in entries if label not in found.series]
    if not labels:
        return
    columns = max(1, min(len(labels), _LETTERS // (max(map(len, labels)) + 8)))
    handles = [entries[label] for label in labels]
    canvas.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8, frameon=False)


def _draw_bars(of: Figure, found: Gathered) -> Canvas:
    """Lying bars from zero, the first on top; deviation, seeds, and the value behind them."""
    canvas = figure(height=0.9 + 0.25 * bool(found.reference) + _BAR_INCHES * len(found.series))
    axis = axes(canvas, of.y)
    rows = range(len(found.series))
    points = list(found.series.values())
    axis.barh(rows, [point.mean for point in points], height=0.62, color=PALETTE[0], alpha=0.75)
    for row, point in zip(rows, points, strict=True):
        axis.errorbar(point.mean, row, xerr=point.around, color="black", linewidth=1.1, capsize=3)
        _dots(axis, [(value, row + 0.18) for value in point.values if len(point.values) > 1], "black")
        end = max(0.0, point.mean + point.around, *point.values)
        axis.annotate(spread(point.values), (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, bbox=_PAPER)
    axis.set_yticks(rows, list(found.series))
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    _references(axis, found.reference, axis.axvline)
    low, high = axis.get_xlim()
    lowest = min(0.0, *(min(point.mean - point.around, *point.values) for point in points))
    axis.set_xlim(low if lowest < 0 else 0.0, high + 0.16 * (high - low))
    _legend(canvas, found)
    return canvas


def _draw_curves(of: Figure, found: Gathered) -> Canvas:
    """The mean of every arm, its seeds pale behind it; of a few places with marks and deviation."""
    canvas = figure(height=3.8)
    axis = axes(canvas, of.x, of.y)
    courses: Mapping[str, Course] = found.series
    places = sorted({point.x for course in courses.values() for point in course.points})
    for number, (name, course) in enumerate(courses.items()):
        color, dash = PALETTE[number % len(PALETTE)], ("-", *DASHES)[number // len(PALETTE) % 4]
        for points in course.seeds if len(course.seeds) > 1 else ():
            axis.plot(*zip(*points, strict=True), color=color, linewidth=0.8, alpha=0.35)
        xs, means = [point.x for point in course.points], [point.mean for point in course.points]
        axis.plot(xs, means, color=color, linestyle=dash, linewidth=1.8, label=name)
        if len(places) <= FEW:
            around = [point.around for point in course.points]
            axis.errorbar(
                xs, means, yerr=around, color=color, linestyle="none", marker=MARKERS[number % len(MARKERS)], markersize=5, capsize=3
            )
    if len(places) <= FEW:
        axis.set_xticks(places, [f"{x:g}" for x in places])
    _references(axis, found.reference, axis.axhline)
    _legend(canvas, found)
    return canvas


def _draw_maps(of: Figure, found: Gathered) -> Canvas:
    """Filled contours, each on a scale of its own: how rugged one is would not be seen on that of a higher one."""
    maps: Mapping[str, Map] = found.series
    columns = 2 if len(maps) in {2, 4} else min(len(maps), COLUMNS)
    rows = -(-len(maps) // columns)
    canvas = figure(width=_PANEL_INCHES * columns, height=0.85 * _PANEL_INCHES * rows)
    drawn = panels(canvas, rows, columns)
    for axis, (name, one) in zip(drawn, maps.items(), strict=False):
        _draw_map(canvas, axis, one, f"{of.z}, seed {one.seed}")
        axis.set_title(textwrap.fill(name, _TITLE_LETTERS), fontsize=9, loc="left")
        axis.set_xlabel(of.x, fontsize=9)
        axis.set_ylabel(of.y, fontsize=9)
    for axis in drawn[len(maps) :]:
        axis.remove()
    return canvas


def _draw_map(canvas: Canvas, axis: Axes, one: Map, label: str) -> None:
    z = np.array([[np.nan if height is None else height for height in row] for row in one.z])
    low, high = np.nanmin(z), np.nanmax(z)
    levels = np.linspace(low, high if high > low else low + 1, LEVELS + 1)
    filled = axis.contourf(one.x, one.y, z, levels=levels, cmap=HEAT)
    axis.contour(one.x, one.y, z, levels=levels, colors="black", linewidths=0.4, linestyles="solid")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.set_box_aspect(1)
    axis.grid(visible=False)
    bar = canvas.colorbar(filled, ax=axis, shrink=0.8, ticks=MaxNLocator(5))
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
