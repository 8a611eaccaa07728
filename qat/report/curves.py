"""Curves over a run, drawn in colours that the page's style decides on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qat.report.html import Html, element
from qat.report.numbers import number, shown
from qat.report.svg import INK, RULE, SERIES, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
MOST_POINTS = 400  # of a line: more cannot be seen, and make the page large
FEW = 25  # points that are told apart as dots
STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": RULE,
    "grid.color": RULE,
    "font.size": 9.0,
}


@dataclass(frozen=True)
class Line:
    """Points of one quantity, two or more of them to be a line."""

    label: str
    x: list[float]
    y: list[float]

    @property
    def course(self) -> str:
        """From where to where."""
        first, last, top = (f"{value:.3g}" for value in (self.y[0], self.y[-1], max(self.y)))
        return (
            f"{self.label} {first}"
            if len(self.y) == 1
            else f"{self.label} {first} → {last}" + (f", highest {top}" if top not in {first, last} else "")
        )

    def described(self, over: str) -> str:
        """Where it begins, ends, and what it reaches."""
        if len(self.x) == 1:
            return f"{self.label}: {shown(self.y[0])} at {over} {shown(self.x[0])}."
        low, high = (pick(range(len(self.y)), key=self.y.__getitem__) for pick in (min, max))
        ends = f"from {shown(self.y[0])} at {over} {shown(self.x[0])} to {shown(self.y[-1])} at {over} {shown(self.x[-1])}"
        extremes = f"lowest {shown(self.y[low])} at {shown(self.x[low])}, highest {shown(self.y[high])} at {shown(self.x[high])}"
        return f"{self.label}: {ends}; {extremes}."


def line(rows: Rows, column: str, label: str, *, x: str = "step") -> Line | None:
    """A column of rows over another; None where there is nothing."""
    pairs = [(number(row.get(x)), number(row.get(column))) for row in rows]
    known = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(b)]
    return Line(label, [a for a, _ in known], [b for _, b in known]) if known else None


def training_curves(rows: Rows) -> list[Html]:
    """Loss, validation accuracy, learning rate and oscillation, as far as `metrics.csv` has them."""
    rates = [column for row in rows[:1] for column in row if column.startswith("lr-")]
    loss = line(rows, "train/loss", "training loss") or line(rows, "train/loss_step", "training loss")
    wanted = [
        ("loss", "Loss", [loss, line(rows, "val/loss", "validation loss")]),
        ("top1", "Validation top-1, %", [line(rows, "val/top1", "validation top-1")]),
        ("lr", "Learning rate", [line(rows, rates[0], "learning rate") if rates else None]),
        ("osc", "Share of weights that oscillate", [line(rows, "osc/share", "oscillating weights")]),
        ("cga", "Share of weights that annealing lets train", [line(rows, "cga/trainable", "trainable weights")]),
    ]
    return [plot(f"curve-{ident}", title, known, "step") for ident, title, lines in wanted if (known := [one for one in lines if one])]


def search_curve(rows: Rows) -> Html:
    """Fitness of all candidates of a search, and of those that were accepted; before the first, that of the calibrated net."""
    begins = sum(row.get("cycle") == "incumbent" for row in rows)
    values = [(i, number(row.get("fitness")), str(row.get("accepted")).lower() in {"true", "1"}) for i, row in enumerate(rows, 1 - begins)]
    known = [(i, fitness, accepted) for i, fitness, accepted in values if fitness is not None and math.isfinite(fitness)]
    taken = [(i, fitness) for i, fitness, accepted in known if accepted]
    best = Line("accepted", [float(i) for i, _ in taken], [fitness for _, fitness in taken])
    words = f"{len(known) - begins} candidates, {len(taken) - begins} of them accepted"
    text = f"{words}. {best.described('candidate') if taken else ''}"

    def extra(axes: Axes) -> None:
        shown_ones = thinned([(float(i), fitness) for i, fitness, _ in known])
        axes.plot(*zip(*shown_ones, strict=True), ".", color=SERIES[1], markersize=4, zorder=1, label="candidates")
        # Hopeless candidates would flatten what the search is about.
        ordered = sorted(fitness for _, fitness, _ in known)
        low, high = ordered[0], max([ordered[int(0.9 * (len(ordered) - 1))], *best.y])
        if high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))

    if taken:  # what was accepted last holds to the end
        best = Line("accepted", [*best.x, float(len(values) - begins)], [*best.y, best.y[-1]])
    caption = f"{words}; lower is closer to the float net"
    title = "Fitness of the search"
    return plot("search", title, [best] if taken else [], "candidate", alt=text, caption=caption, extra=extra if known else None, step=True)


def plot(
    ident: str,
    title: str,
    lines: Sequence[Line],
    over: str,
    *,
    alt: str | None = None,
    caption: str | None = None,
    extra: Callable[[Axes], None] | None = None,
    step: bool = False,
) -> Html:
    """A figure with its caption.

    Args:
        ident: of the figure, unique in the page.
        title: above it.
        lines: what is drawn.
        over: name of the x axis.
        alt: in words; None = made of the lines.
        caption: below it; likewise.
        extra: draws more on the axes first.
        step: a value holds until the next one; values that go up and down are points.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    words = alt or " ".join(one.described(over) for one in lines)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        if extra is not None:
            extra(axes)
        for one, color in zip(lines, SERIES, strict=False):
            _draw(axes, one, color, step=step)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.6, alpha=0.6)
        axes.set_xlabel(over)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.ticklabel_format(style="sci", scilimits=(-3, 5), useOffset=False)
        if len(lines) + (extra is not None) > 1:
            axes.legend(frameon=False, fontsize=8)
        drawn = inline(figure, ident, title, words)
    short = caption or "; ".join(one.course for one in lines)
    legend = element("figcaption", element("strong", title), element("span", f"{short[:1].upper()}{short[1:]}"))
    return element("figure", drawn, legend, class_="plot")


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: of each stretch the lowest and the highest point, which are what is seen of it."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    ends = ({pick(stretch, key=lambda point: point[1]) for pick in (min, max)} for stretch in stretches)
    return [point for pair in ends for point in sorted(pair)]


def _draw(axes: Axes, line: Line, color: str, *, step: bool) -> None:
    points = thinned(list(zip(line.x, line.y, strict=True)))
    join = "-" if not step or all(a >= b for a, b in pairwise(line.y)) else ""
    marker = "o" if len(points) <= FEW or not join else ""
    how: Any = {"linestyle": join, "drawstyle": "steps-post" if step else "default", "marker": marker, "markersize": 3, "linewidth": 1.6}
    axes.plot(*zip(*points, strict=True), color=color, label=line.label, **how)
