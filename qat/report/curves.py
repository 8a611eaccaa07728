"""Curves over a run, drawn by matplotlib in colours that the page's style decides on."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qat.report.numbers import number, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 25  # points that are told apart as dots
MOST_CANDIDATES = 400  # of a search: more cannot be seen, and make the page large
FIRST, SECOND = "#0072B2", "#D55E00"
# Colours of the drawings, and what stands for them in the page; text has none, and black is the default.
COLOURS = {FIRST: "var(--series-1)", SECOND: "var(--series-2)", "#e6e6e6": "var(--rule)", "#000000": "currentColor"}
# What the page does not need of matplotlib's file, ids that nothing refers to included: other figures have the same.
_LEFT_OUT = re.compile(r'\A.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| id="[\w.]+_\d+"|(?<=\n)\s+', re.DOTALL)


@dataclass(frozen=True)
class Curve:
    """A figure of the page.

    Attributes:
        title: above it.
        words: what it shows, below it.
        svg: an element of the page.
    """

    title: str
    words: str
    svg: Markup


def draw(ident: str, title: str, words: str, paint: Callable[[Axes], None], *, height: float = 2.5) -> Curve:
    """Make a figure.

    Args:
        ident: of the figure in the page.
        title: its heading.
        words: what it shows.
        paint: draws on the axes.
        height: in inches; the width is 4.6.
    """
    import matplotlib as mpl

    from qat.analysis import style as drawing

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": ident, "path.simplify_threshold": 0.5}):  # the last for long runs
        figure = drawing.figure(4.6, height)
        axes = drawing.axes(figure)
        paint(axes)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None}, bbox_inches="tight")
    svg = _LEFT_OUT.sub("", text.getvalue())
    for colour, style in COLOURS.items():
        svg = svg.replace(colour.lower(), style)
    return Curve(title, words, Markup(svg))  # matplotlib escapes the text in it


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Losses, validation accuracy, learning rate, oscillation and annealing, as far as `metrics.csv` has them."""
    rate = next((column for row in rows[:1] for column in row if column.startswith("lr-")), "")
    wanted = (
        *_losses(rows),
        ("Validation top-1, %", {"validation top-1": "val/top1"}),
        ("Learning rate", {"learning rate": rate}),
        ("Share of weights that oscillate", {"oscillating weights": "osc/share"}),
        ("Share of weights that annealing lets train", {"trainable weights": "cga/trainable"}),
    )
    found = []
    for i, (title, columns) in enumerate(wanted):
        lines = {label: points for label, column in columns.items() if (points := _points(rows, column))}
        if lines:
            found.append(_over_steps(f"curve-{i}", title, lines))
    return found


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Figures of losses, each with its columns by label: on the same axis is only what measures the same."""
    named = dict.fromkeys(column for row in rows for column in row if column.startswith("train/loss_") and column != "train/loss_step")
    terms = [column.removeprefix("train/loss_") for column in named]
    total = "train/loss" if any(row.get("train/loss") for row in rows) else "train/loss_step"
    title = f"Training loss ({' + '.join(terms)})" if terms else "Training loss"
    if "ce" not in terms:  # a distillation, say
        return [(title, {"training loss": total}), ("Cross entropy of the validation images", {"validation": "val/loss"})]
    both = ("Cross entropy", {"training": "train/loss_ce", "validation": "val/loss"})
    return [both] if terms == ["ce"] else [both, (title, {"training loss": total})]


def search_curve(rows: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Fitness of the candidates of a search, and of those that were accepted; the first row may be that of the calibrated net."""
    begins = sum(row.get("cycle") == "incumbent" for row in rows)
    known = [(i, fitness, row) for i, row in enumerate(rows, 1 - begins) if (fitness := _finite(row.get("fitness"))) is not None]
    taken = [(i, fitness) for i, fitness, row in known if str(row.get("accepted")).lower() in {"true", "1", "1.0"}]
    if not known:
        return None
    words = f"{len(known) - begins} candidates, {len(taken) - begins} of them accepted; lower is closer to the float model."
    if taken:
        words += f" {_described('accepted', taken, 'candidate')}"
    best = [fitness for _, fitness in taken]
    is_falling = best == sorted(best, reverse=True)

    def paint(axes: Axes) -> None:
        some = known[:: math.ceil(len(known) / MOST_CANDIDATES)]
        axes.plot([i for i, _, _ in some], [fitness for _, fitness, _ in some], ".", color=SECOND, markersize=4, label="candidates")
        if taken:  # what was accepted last holds to the end
            line = [*taken, (known[-1][0], best[-1])] if is_falling else taken
            axes.plot(
                *zip(*line, strict=True), "o-" if is_falling else "o", color=FIRST, markersize=3, drawstyle="steps-post", label="accepted"
            )
        # Hopeless candidates would flatten what the search is about.
        ordered = sorted(fitness for _, fitness, _ in known)
        low, high = ordered[0], max([ordered[int(0.9 * (len(ordered) - 1))], *best])
        if high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        axes.set_xlabel("candidate")

    return draw("search", "Fitness of the search", words, paint)


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    """Step and value, where both are known."""
    pairs = [(_finite(row.get("step")), _finite(row.get(column))) for row in rows]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _finite(value: object) -> float | None:
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def _over_steps(ident: str, title: str, lines: Mapping[str, list[tuple[float, float]]]) -> Curve:
    def paint(axes: Axes) -> None:
        for (label, points), colour in zip(lines.items(), (FIRST, SECOND), strict=False):
            marker = "o" if len(points) <= FEW else ""
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=3, linewidth=1.6)
        axes.set_xlabel("step")
        steps = {step for points in lines.values() for step, _ in points}
        if len(steps) > 1:
            axes.locator_params(axis="x", nbins=6, integer=True)
        else:
            axes.set_xticks([*steps])

    return draw(ident, title, " ".join(_described(label, points, "step") for label, points in lines.items()), paint)


def _described(label: str, points: Sequence[tuple[float, float]], over: str) -> str:
    """Where a line begins and ends, and its extremes."""
    (first, begin), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{label}: {shown(begin)} at {over} {shown(first)}."
    extremes = [(word, *pick(points, key=lambda point: point[1])) for word, pick in (("lowest", min), ("highest", max))]
    others = "".join(f"; {word} {shown(value)} at {shown(at)}" for word, at, value in extremes if at not in {first, last})
    return f"{label}: from {shown(begin)} at {over} {shown(first)} to {shown(end)} at {over} {shown(last)}{others}."
