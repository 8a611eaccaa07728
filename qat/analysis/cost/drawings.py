"""Bars of what kinds of modules cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qat.analysis.analysis import Drawing, Row
from qat.analysis.style import PALETTE, axes, figure
from qat.utils.text import scaled

# The same colour for a kind in every picture; the order is that of the stack.
COLOURS = dict(zip(("attention weights", "attention products", "MLP", "patch embedding", "head", "norms", "other"), PALETTE, strict=True))


def by_kind(name: str, title: str, unit: str, bars: Mapping[str, Sequence[Row]], in_float: Mapping[str, int]) -> Drawing:
    """One stacked bar a net.

    Args:
        name: of the files.
        title: above.
        unit: the column that is drawn.
        bars: by label, a row for each kind.
        in_float: by label, what float nets have in that column.
    """
    drawn = figure(height=1.5 + 0.55 * len(bars))
    axis = axes(drawn, f"{unit} (millions)")
    labels = list(bars)
    order = list(COLOURS)
    for number, (kind, colour) in enumerate(COLOURS.items()):
        values = [sum(row[unit] for row in bars[label] if row["kind"] == kind) / 1e6 for label in labels]
        starts = [sum(row[unit] for row in bars[label] if row["kind"] in order[:number]) / 1e6 for label in labels]
        if any(values):
            axis.barh(labels, values, left=starts, color=colour, label=kind, height=0.6, edgecolor="white", linewidth=0.5)
    for place, rows in enumerate(bars.values()):
        value = sum(row[unit] for row in rows)
        axis.text(value / 1e6, place, f" {scaled(value)}", va="center", fontsize=8)
    axis.margins(x=0.12)
    axis.grid(axis="y", visible=False)
    axis.invert_yaxis()
    axis.set_title("; ".join(f"{label}: {scaled(value)}" for label, value in in_float.items()), fontsize=8, loc="right")
    drawn.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    said = "; ".join(f"{label}: {_spoken_shares(rows, unit)}" for label, rows in bars.items())
    floats = "; ".join(f"{label}: {scaled(value)} {unit}" for label, value in in_float.items())
    return Drawing(name, title, f"{title}, by kind of module. {said}. {floats}".strip(), drawn)


def _spoken_shares(rows: Sequence[Row], unit: str) -> str:
    whole = sum(row[unit] for row in rows)
    shares = ", ".join(f"{row['kind']} {100 * row[unit] / whole:.0f} %" for row in rows if row[unit]) if whole else ""
    return f"{scaled(whole)} {unit} ({shares})"
