"""A drawing of size against fitness, and against accuracy where it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.analysis import Drawing
from qat.analysis.drawing import figure, panels
from qat.analysis.output import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KB = 1e3


def draw_front(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[tuple[int, float]],
    *,
    budget: int,
    uniform: Mapping[int, tuple[int, float]],
) -> None:
    """Write `front.svg` and `front.png`.

    Args:
        folder: where they go.
        rows: points of the front by ascending size: `size_bytes`, `fitness`, `top1` in percent or None, `selected`.
        others: size in bytes and fitness of everything that was evaluated.
        budget: bytes.
        uniform: size and fitness of models with equal bits everywhere, by bits.
    """
    measured = [row for row in rows if row["top1"] is not None]
    drawn = figure(10 if measured else 5.4, 3.8)
    first, *second = panels(drawn, 1, 2 if measured else 1)
    first.scatter([size / _KB for size, _ in others], [fitness for _, fitness in others], s=6, color="0.8", label="evaluated")
    _points(first, rows, "fitness")
    for bits, (size, fitness) in uniform.items():
        first.annotate(f"{bits} bit", (size / _KB, fitness), xytext=(3, 3), textcoords="offset points", fontsize=8)
    equal = list(uniform.values())
    first.scatter([size / _KB for size, _ in equal], [f for _, f in equal], s=22, marker="s", color="C1", zorder=3, label="equal bits")
    first.set(ylabel="fitness on calibration images")
    for axis in second:
        _points(axis, measured, "top1")
        axis.set(ylabel="top-1, %")
    for axis in (first, *second):
        axis.axvline(budget / _KB, color="0.6", lw=1, ls="--", label="budget")
        axis.set(xlabel="size as stored, kB")
    first.legend(frameon=False, fontsize=8)
    save(Path(folder), Drawing("front", "Size and fitness", "Size against fitness on calibration images.", drawn))


def _points(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    axis.plot([row["size_bytes"] / _KB for row in rows], [row[key] for row in rows], "o-", color="C0", ms=3, lw=1, label="front")
    for row in rows:
        if row["selected"]:
            axis.plot(row["size_bytes"] / _KB, row[key], "*", color="C3", ms=11, zorder=4, label="selected")
