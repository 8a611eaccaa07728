"""Figures of a page, drawn by matplotlib: curves of a training, candidates of a search."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qat.report.numbers import shown

FIRST, SECOND = "#0072B2", "#D55E00"
FEW = 25  # points that are drawn as dots
TOTAL = "Training loss, all terms"
# Titles of curves over training steps, and what each shows: columns of `metrics.csv` (patterns) by label.
CURVES = (
    ("Cross entropy", {"training": "train/loss_ce", "validation": "val/loss"}),
    (TOTAL, {"training": "train/loss(_step)?"}),
    ("Validation top-1, %", {"top-1": "val/top1"}),
    ("Learning rate", {"learning rate": "lr-.*"}),
    ("Share of weights that oscillate", {"share": "osc/share"}),
    ("Share of weights that annealing lets train", {"share": "cga/trainable"}),
)


def data_url(svg: bytes) -> str:
    """An SVG file as the source of an `img`; whatever ids, links or scripts it has stay inside."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def draw(title: str, words: str, paint: Callable[[Axes], None], height: float = 2.5) -> dict[str, str]:
    """A figure of a page: its title, what it shows in words, and its source.

    Args:
        title: above it.
        words: what it shows.
        paint: draws on the axes.
        height: inches; the width is 4.6.
    """
    content = io.BytesIO()
    # Text stays text, and a dollar sign in it too.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "path.simplify_threshold": 0.5}):
        figure = Figure(figsize=(4.6, height))
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        paint(axes)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return {"title": title, "alt": words, "source": data_url(content.getvalue())}


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Losses, validation accuracy, learning rate, oscillation and annealing, as far as rows of `metrics.csv` have them."""
    columns = sorted({column for row in rows for column, value in row.items() if value != ""})
    terms = [column for column in columns if column.startswith("train/loss_") and column != "train/loss_step"]
    figures = []
    for title, labels in CURVES:
        if terms == ["train/loss_ce"] and title == TOTAL:
            continue  # the cross entropy again
        names = {label: next((one for one in columns if re.fullmatch(name, one)), "") for label, name in labels.items()}
        found = {label: _finite((row.get("step"), row.get(name)) for row in rows) for label, name in names.items()}
        if lines := {label: points for label, points in found.items() if points}:
            figures.append(_curves(title, lines))
    return figures


def _curves(title: str, lines: Mapping[str, list[tuple[float, float]]], over: str = "step") -> dict[str, str]:
    def paint(axes: Axes) -> None:
        for (label, points), colour in zip(lines.items(), (FIRST, SECOND), strict=False):
            axes.plot(*zip(*points, strict=True), "o-" if len(points) <= FEW else "-", color=colour, label=label, markersize=3)
        axes.set_xlabel(over)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    ends = {label: [f"{shown(value)} at {over} {shown(x)}" for x, value in (points[0], points[-1])] for label, points in lines.items()}
    return draw(title, " ".join(f"{label}: {' to '.join(dict.fromkeys(both))}." for label, both in ends.items()), paint)


def search_figure(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Fitness of the candidates that a search accepted; lower is closer to the float model."""
    taken = _finite((i, row.get("fitness")) for i, row in enumerate(rows) if row.get("accepted") == 1)
    return [_curves("Fitness of accepted candidates (lower is better)", {"fitness": taken}, "candidate")] if taken else []


def _finite(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """Pairs of finite numbers."""
    return [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(x + y)]
