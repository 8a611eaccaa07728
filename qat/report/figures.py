"""Numbers and figures for a page, such as curves of a training run, and candidates of a search.

"–" stands for an unknown number.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qat.analysis.analysis import PALETTE, SEQUENTIAL_COLORMAP, panels, save_figure
from qat.utils.text import MISSING

WIDTH = 4.6  # inches
MAX_VALUE = 1e100  # the standard deviation of larger numbers may overflow
MAX_CLASSES = 60  # a heat map with more classes would have illegible labels
MAX_LABEL_LENGTH = 20  # characters of the name of a class
MAX_POINTS_WITH_DOTS = 25  # a curve with more points is drawn without dots
# Titles of curves over training steps, with patterns for their columns in `metrics.csv`.
CURVES = {
    "Training loss": "train/loss(_step)?",
    "Validation loss": "val/loss",
    "Validation top-1, %": "val/top1",
    "Learning rate": "lr-.*",
    "Share of weights that oscillate": "osc/share",
    "Share of weights that annealing trains": "cga/trainable",
}


def is_drawable(value: object) -> TypeGuard[float]:
    """True for a number whose magnitude is below `MAX_VALUE`."""
    return isinstance(value, int | float) and abs(value) < MAX_VALUE


def parse_number(value: object) -> float | None:
    """Convert a number or its text to a float, maybe NaN or infinity. Returns None otherwise."""
    text = str(value)
    if "_" in text:  # `float` reads 2024_01_15 as 20240115
        return None
    try:
        return float(text)
    except ValueError:
        return None


def format_value(value: object) -> str:
    """Format a number: integers < 1e15 get thousands separators, others four significant digits.

    Non-integers from 100 to 1e6 (in magnitude) get separators and two decimals. NaN, infinity and
    values that are not numbers become text; None becomes "–".
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.2f}" if 100 <= abs(value) < 1e6 else f"{value:.4g}"


def bits_of(recipe: Mapping[str, Any] | None) -> str | None:
    """Bits of weights and activations, such as `W2 A2`; None for `fp` or without recipe."""
    if not recipe or recipe["name"] == "fp":
        return None
    return f"W{recipe['bits']} A{recipe['act_bits']}"


def data_url(svg: bytes) -> str:
    """An SVG file as the source of an `img`, which isolates the file's ids, links and scripts."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def picture(title: str, description: str, figure: Figure) -> dict[str, str]:
    """A figure for a page: its title, a description in words, and the source of the image."""
    content = io.BytesIO()
    save_figure(content, figure, title, description)
    return {"title": title, "alt": description, "source": data_url(content.getvalue())}


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Draw the curves of `CURVES` for which the rows of `metrics.csv` have numbers.

    If several columns match a title, only the first by name is drawn.
    """
    columns: set[str] = set()
    for row in rows:
        columns.update(name for name, value in row.items() if value != "")
    curves = []
    for title, pattern in CURVES.items():
        matches = sorted(name for name in columns if re.fullmatch(pattern, name))
        if not matches:
            continue
        curve = _curve(title, [(row.get("step"), row.get(matches[0])) for row in rows])
        if curve is not None:
            curves.append(curve)
    return curves


def search_figure(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Draw the fitness of accepted candidates of a search; lower is closer to the float model."""
    accepted = [(i, row.get("fitness")) for i, row in enumerate(rows) if row.get("accepted") == 1]
    curve = _curve("Fitness of accepted candidates (lower is better)", accepted, "candidate")
    return [] if curve is None else [curve]


def confusion_map(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A heat map of `confusion.csv`: predictions of each true class, in percent of its images.

    The list is empty unless there are counts for 2 to `MAX_CLASSES` classes.
    """
    # Read the names of classes from the columns: in the rows, a class named "0" was parsed to 0.0.
    names = list(rows[0])[1:] if rows else []
    if len(names) != len(rows) or not 2 <= len(names) <= MAX_CLASSES:
        return []
    percentages = []
    for row in rows:
        counts = list(row.values())[1:]
        if not all(map(is_drawable, counts)):
            return []
        percentages.append([100 * count / max(sum(counts), 1) for count in counts])
    if not any(map(any, percentages)):
        return []
    side = 2.2 + 0.16 * len(names)
    figure, (panel,) = panels(width=side + 0.8, height=side)
    panel.grid(visible=False)
    # The square-root scale keeps a few mistakes visible next to a hundred correct predictions.
    image = panel.imshow(
        percentages, cmap=SEQUENTIAL_COLORMAP, norm=PowerNorm(0.5, vmin=0, vmax=100)
    )
    labels = [name[:MAX_LABEL_LENGTH] for name in names]
    panel.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
    panel.set_yticks(range(len(names)), labels, fontsize=7)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    figure.colorbar(image, ax=panel, label="% of the images of a class", shrink=0.8)
    percent_correct = {}
    for index, row_percentages in enumerate(percentages):
        if any(row_percentages):  # the class has images
            percent_correct[names[index]] = row_percentages[index]
    worst_class = min(percent_correct, key=percent_correct.__getitem__)
    description = (
        f"Rows are true classes, columns predicted ones. Lowest: {worst_class}, "
        f"{percent_correct[worst_class]:.1f} % right. All counts are in confusion.csv."
    )
    return [picture("Predictions of each class", description, figure)]


def _curve(
    title: str, pairs: Sequence[tuple[Any, Any]], xlabel: str = "step"
) -> dict[str, str] | None:
    """Draw a line through all pairs of numbers. Returns None if there is no such pair."""
    xs = []
    ys = []
    for x, y in pairs:
        if is_drawable(x) and is_drawable(y):
            xs.append(x)
            ys.append(y)
    if not xs:
        return None
    figure, (panel,) = panels(width=WIDTH, height=2.5)
    line = "o-" if len(xs) <= MAX_POINTS_WITH_DOTS else "-"
    panel.plot(xs, ys, line, color=PALETTE[0], markersize=3)
    panel.set_xlabel(xlabel)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    first_point = f"{format_value(ys[0])} at {xlabel} {format_value(xs[0])}"
    last_point = f"{format_value(ys[-1])} at {xlabel} {format_value(xs[-1])}"
    description = first_point if first_point == last_point else f"{first_point} to {last_point}"
    return picture(title, f"{description}.", figure)
