"""Numbers and figures of a page: curves of a training, candidates of a search; "–" stands for a number that is not known."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qat.analysis.analysis import PALETTE, panels, save_figure
from qat.utils.text import MISSING

WIDTH = 4.6  # inches
MOST_MEASURED = 1e100  # the spread of larger numbers overflows
FEW = 25  # points that are drawn as dots
# Titles of curves over training steps, and patterns of their columns in `metrics.csv`.
CURVES = {
    "Training loss": "train/loss(_step)?",
    "Validation loss": "val/loss",
    "Validation top-1, %": "val/top1",
    "Learning rate": "lr-.*",
    "Share of weights that oscillate": "osc/share",
    "Share of weights that annealing lets train": "cga/trainable",
}


def number(value: object) -> float | None:
    """The number that a value is or spells, else None; NaN and infinity are numbers too."""
    try:
        return float(str(value))
    except ValueError:
        return None


def is_measured(value: object) -> TypeGuard[float]:
    """True for a finite number of at most `MOST_MEASURED`."""
    return isinstance(value, int | float) and abs(value) < MOST_MEASURED


def shown(value: object) -> str:
    """Whole numbers with separators, others with four significant digits; text as it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.2f}" if 100 <= abs(value) < 1e6 else f"{value:.4g}"


def bits_of(recipe: Mapping[str, Any] | None) -> str | None:
    """`W2 A2`; None for a float model."""
    return f"W{recipe['bits']} A{recipe['act_bits']}" if recipe and recipe["name"] != "fp" else None


def data_url(svg: bytes) -> str:
    """An SVG file as the source of an `img`; whatever ids, links or scripts it has stay inside."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def picture(title: str, words: str, drawn: Figure) -> dict[str, str]:
    """A figure of a page: its title, what it shows in words, and its source."""
    content = io.BytesIO()
    save_figure(content, drawn, title, words)
    return {"title": title, "alt": words, "source": data_url(content.getvalue())}


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Losses, validation accuracy, learning rate, oscillation and annealing, as far as rows of `metrics.csv` have them."""
    columns = sorted({column for row in rows for column, value in row.items() if value != ""})
    named = {
        title: next((one for one in columns if re.fullmatch(name, one)), "")
        for title, name in CURVES.items()
    }
    curves = (
        _curve(title, [(row.get("step"), row.get(name)) for row in rows])
        for title, name in named.items()
    )
    return [curve for curve in curves if curve]


def search_figure(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Fitness of the candidates that a search accepted; lower is closer to the float model."""
    taken = [(i, row.get("fitness")) for i, row in enumerate(rows) if row.get("accepted") == 1]
    curve = _curve("Fitness of accepted candidates (lower is better)", taken, "candidate")
    return [curve] if curve else []


def _curve(
    title: str, pairs: Sequence[tuple[Any, Any]], over: str = "step"
) -> dict[str, str] | None:
    """A line through the pairs of numbers that can be drawn, if there are any."""
    points = [(x, y) for x, y in pairs if is_measured(x) and is_measured(y)]
    if not points:
        return None
    drawn, (axis,) = panels(width=WIDTH, height=2.5)
    axis.plot(
        *zip(*points, strict=True),
        "o-" if len(points) <= FEW else "-",
        color=PALETTE[0],
        markersize=3,
    )
    axis.set_xlabel(over)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ends = dict.fromkeys(f"{shown(y)} at {over} {shown(x)}" for x, y in (points[0], points[-1]))
    return picture(title, f"{' to '.join(ends)}.", drawn)
