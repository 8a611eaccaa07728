"""What a figure of a claim shows: points with their seeds, gathered from records, and drawn as files that are the same bytes each time."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence.claims import Claim, Figure
from evidence.records import Record
from qat.errors import UsageError
from qat.utils.files import replacing

if TYPE_CHECKING:  # the heavy libraries are for pictures alone
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from evidence.page import Evidence

MARKERS = "osD^vP*X"
DASHES = ("--", ":", "-.")
LEVELS = 12
# A range of places along x so wide that the smaller ones would lie on each other.
LOG_FROM = 30
# Places of a curve up to which each is worth a mark.
FEW = 13
_PANEL_INCHES = 3.3
# How many letters of the size of labels go into the width of a figure, and into the title of a panel.
_LETTERS, _TITLE_LETTERS = 92, 34
_STYLE: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "qat", "font.family": "DejaVu Sans"}


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
        """Sample deviation; nothing for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Curve:
    """The points of every seed, `{x: y}` each."""

    seeds: tuple[Mapping[float, float], ...]

    @property
    def points(self) -> list[Point]:
        """By x, at the places that all seeds have."""
        shared = sorted(set(self.seeds[0]).intersection(*self.seeds[1:]))
        return [Point(x, tuple(points[x] for points in self.seeds)) for x in shared]


@dataclass(frozen=True)
class Gathered:
    """What there is to draw; names without any run are left out.

    Attributes:
        series: by name, of the kind's type: a list of `Point`s, a `Curve`, the `Record` of a map.
        reference: by name.
    """

    series: Mapping[str, Any]
    reference: Mapping[str, Point]


def gather(claim: Claim, figure: Figure, evidence: Evidence) -> Gathered:
    """From the records.

    Raises:
        UsageError: there are runs of its arms, and none has what it shows.
    """
    reader = {"lines": _points, "scatter": _spots, "curves": _curve, "map": _map}[figure.kind]
    series = {name: found for name, shown in figure.series.items() if (found := reader(claim, figure, shown, evidence))}
    runs = any(evidence.records(claim, arm) for arm in figure.arms if arm not in figure.reference.values())
    if runs and not series:
        raise UsageError(f"{claim.file}: figure {figure.file}: {figure.curve or figure.metric} must be in a run of its arms")
    points = {name: _point(claim, arm, figure.metric, evidence) for name, arm in figure.reference.items()}
    return Gathered(series, {name: point for name, point in points.items() if point})


def alt(claim: Claim, figure: Figure, evidence: Evidence) -> str:
    """What a figure shows, for those who do not see it."""
    found = gather(claim, figure, evidence)
    over = " over ".join(text for text in (figure.y or figure.curve or figure.metric, figure.x) if text)
    return " ".join(f"{over}: {', '.join([*found.series, *found.reference])}".replace("[", "(").replace("]", ")").split())


def _point(claim: Claim, arm: str, metric: str, evidence: Evidence, x: Any = None) -> Point | None:
    values = evidence.values(claim, arm, metric)
    return Point(x, tuple(values.values())) if values else None


def _points(claim: Claim, figure: Figure, arms: Mapping[Any, str], evidence: Evidence) -> list[Point]:
    return [point for x, arm in arms.items() if (point := _point(claim, arm, figure.metric, evidence, x))]


def _spots(claim: Claim, figure: Figure, arms: Mapping[str, str], evidence: Evidence) -> list[Point]:
    pairs = {name: (_point(claim, arm, figure.along, evidence), _point(claim, arm, figure.metric, evidence)) for name, arm in arms.items()}
    return [Point(x.mean, y.values, name) for name, (x, y) in pairs.items() if x and y]


def _curve(claim: Claim, figure: Figure, arm: str, evidence: Evidence) -> Curve | None:
    found = [record.curves.get(figure.curve, []) for record in evidence.records(claim, arm)]
    seeds = [{float(x): float(y) for x, y in points if x is not None and y is not None} for points in found]
    return Curve(tuple(filter(None, seeds))) if any(seeds) else None


def _map(claim: Claim, figure: Figure, arm: str, evidence: Evidence) -> Record | None:
    """Of the first seed that has it: the mean of maps would be smoother than each."""
    return next((record for record in evidence.records(claim, arm) if figure.curve in record.maps), None)


def write(claim: Claim, figure: Figure, evidence: Evidence, folder: Path) -> Path | None:
    """Draw a figure as SVG into a folder; None where there is nothing to draw yet."""
    found = gather(claim, figure, evidence)
    if not found.series:
        return None
    import matplotlib as mpl

    path = folder / figure.file
    with mpl.rc_context(mpl.rcParamsDefault | _STYLE), replacing(path) as temporary:
        draw(figure, found).savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    return path


def draw(of: Figure, found: Gathered) -> Canvas:
    """The picture."""
    from qat.analysis.style import axes, figure

    if of.kind == "map":
        return _draw_maps(of, found)
    canvas = figure(height=3.8)
    axis = axes(canvas, of.x, of.y)
    {"lines": _draw_lines, "scatter": _draw_scatter, "curves": _draw_curves}[of.kind](axis, found)
    _references(axis, found.reference)
    _legend(canvas, found)
    return canvas


def _draw_lines(axis: Axes, found: Gathered) -> None:
    """Means with their deviation over places, a dot for every seed beside them."""
    from qat.analysis.style import PALETTE

    places = _places(found.series)
    step = min((abs(b - a) for a, b in itertools.pairwise(sorted(set(places.values())))), default=1.0)
    line: dict[str, Any] = {"linewidth": 1.4} if all(_number(x) is not None for x in places) else {"linestyle": "none"}
    for number, (name, points) in enumerate(found.series.items()):
        shift = (number - (len(found.series) - 1) / 2) * 0.06 * step
        xs = [places[point.x] + shift for point in points]
        look = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)], **line}
        means, around = [point.mean for point in points], [point.around for point in points]
        axis.errorbar(xs, means, yerr=around, markersize=5, capsize=3, label=name, **look)
        dots = [(x + 0.025 * step, value) for x, point in zip(xs, points, strict=True) for value in point.values if len(point.values) > 1]
        if dots:
            marks = {"marker": "o", "markersize": 3.2, "markeredgewidth": 0}
            axis.plot(*zip(*dots, strict=True), linestyle="none", color=look["color"], alpha=0.6, **marks)
    axis.set_xticks(list(places.values()), [textwrap.fill(str(x), max(6, _LETTERS // len(places))) for x in places])
    axis.set_xlim(min(places.values()) - 0.25 * step, max(places.values()) + 0.25 * step)
    axis.grid(visible=False, axis="x")


def _places(series: Mapping[str, Sequence[Point]]) -> dict[object, float]:
    """Where each x lies: numbers at their value, on a logarithmic axis at their decade, others one behind the other."""
    named = dict.fromkeys(point.x for points in series.values() for point in points)
    numbers = {x: value for x in named if (value := _number(x)) is not None}
    if len(numbers) < len(named):
        return {x: float(number) for number, x in enumerate(named)}
    found = dict(sorted(numbers.items(), key=lambda item: item[1]))
    low, high = min(found.values()), max(found.values())
    return {x: math.log10(value) for x, value in found.items()} if low > 0 and high / low >= LOG_FROM else found


def _number(x: object) -> float | None:
    """YAML takes 1e-4 for a text."""
    try:
        return float(str(x))
    except ValueError:
        return None


def _draw_scatter(axis: Axes, found: Gathered) -> None:
    """Means with their deviation, joined in the order of their cost; the last series says what its points are."""
    from qat.analysis.style import PALETTE

    axis.set_xscale("log")
    axis.margins(x=0.08, y=0.1)
    for number, (name, points) in enumerate(found.series.items()):
        look = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)], "linewidth": 1.4}
        points = sorted(points, key=lambda point: point.x)
        means, around = [point.mean for point in points], [point.around for point in points]
        axis.errorbar([point.x for point in points], means, yerr=around, markersize=5, capsize=3, label=name, **look)
    for point in points:
        axis.annotate(point.name, (point.x, point.mean), (0, -14), textcoords="offset points", ha="center", fontsize=7)


def _draw_curves(axis: Axes, found: Gathered) -> None:
    """The mean of every arm, its seeds pale behind it; of a few places with marks and deviation."""
    from qat.analysis.style import PALETTE

    places = sorted({point.x for curve in found.series.values() for point in curve.points})
    for number, (name, curve) in enumerate(found.series.items()):
        color, dash = PALETTE[number % len(PALETTE)], ("-", *DASHES)[number // len(PALETTE) % 4]
        for points in curve.seeds if len(curve.seeds) > 1 else ():
            axis.plot(*zip(*sorted(points.items()), strict=True), color=color, linewidth=0.8, alpha=0.35)
        xs, means = [point.x for point in curve.points], [point.mean for point in curve.points]
        axis.plot(xs, means, color=color, linestyle=dash, linewidth=1.8, label=name)
        if len(places) <= FEW:
            around = [point.around for point in curve.points]
            look = {"linestyle": "none", "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "capsize": 3}
            axis.errorbar(xs, means, yerr=around, color=color, **look)
    if len(places) <= FEW:
        axis.set_xticks(places, [f"{x:g}" for x in places])


def _references(axis: Axes, reference: Mapping[str, Point]) -> None:
    """Means of other arms, across."""
    from qat.analysis.style import GREY

    for (name, point), dash in zip(reference.items(), itertools.cycle(DASHES), strict=False):
        spread = f" ± {point.around:.2f}" if len(point.values) > 1 else ""
        axis.axhline(point.mean, color=GREY, linestyle=dash, linewidth=1.2, label=f"{name} {point.mean:.2f}{spread}", zorder=1)


def _legend(canvas: Canvas, found: Gathered) -> None:
    """Above the axes, in as many columns as there is room for; references last."""
    entries = dict(zip(*reversed(canvas.axes[0].get_legend_handles_labels()), strict=True))
    labels = sorted(entries, key=lambda label: label not in found.series)
    columns = max(1, min(len(labels), _LETTERS // (max(map(len, labels)) + 8)))
    canvas.legend([entries[label] for label in labels], labels, loc="outside upper left", ncols=columns, fontsize=8, frameon=False)


def _draw_maps(of: Figure, found: Gathered) -> Canvas:
    """Filled contours side by side, each on a scale of its own: how rugged one is would not be seen on that of a higher one."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from qat.analysis.style import HEAT, figure, panels

    canvas = figure(width=_PANEL_INCHES * len(found.series), height=0.85 * _PANEL_INCHES)
    for axis, (name, record) in zip(panels(canvas, 1, len(found.series)), found.series.items(), strict=True):
        plane = record.maps[of.curve]
        z = np.array(plane["z"], dtype=float)
        low, high = np.nanmin(z), np.nanmax(z)
        levels = np.linspace(low, high if high > low else low + 1, LEVELS + 1)
        filled = axis.contourf(plane["x"], plane["y"], z, levels=levels, cmap=HEAT)
        axis.contour(plane["x"], plane["y"], z, levels=levels, colors="black", linewidths=0.4, linestyles="solid")
        axis.set_title(textwrap.fill(name, _TITLE_LETTERS), fontsize=9, loc="left")
        axis.set_xlabel(of.x, fontsize=9)
        axis.set_ylabel(of.y, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_box_aspect(1)
        axis.grid(visible=False)
        bar = canvas.colorbar(filled, ax=axis, shrink=0.8, ticks=MaxNLocator(5))
        bar.ax.tick_params(labelsize=7)
        bar.set_label(f"{of.z or of.curve}, seed {record.seed}", fontsize=8)
    return canvas
