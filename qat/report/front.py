"""A drawing of size against fitness, and against accuracy where it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
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
        uniform: size and fitness of nets with equal bits everywhere, by bits.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["top1"] is not None]
    figure = Figure(figsize=(10 if measured else 5.4, 3.8), layout="constrained")
    axes = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    _fitness(axes[0], rows, others, uniform)
    if measured:
        _points(axes[1], measured, "top1")
        axes[1].set(ylabel="top-1, %")
    for axis in axes:
        axis.axvline(budget / _KB, color="0.6", lw=1, ls="--", label="budget")
        axis.set(xlabel="size as stored, kB")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "qat"}):
        for kind in FORMATS:
            with replacing(Path(folder) / f"front.{kind}") as path:
                figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _fitness(
    axis: Axes, rows: Sequence[Mapping[str, Any]], others: Sequence[tuple[int, float]], uniform: Mapping[int, tuple[int, float]]
) -> None:
    axis.scatter([size / _KB for size, _ in others], [fitness for _, fitness in others], s=6, color="0.8", label="evaluated")
    _points(axis, rows, "fitness")
    for bits, (size, fitness) in uniform.items():
        axis.annotate(f"{bits} bit", (size / _KB, fitness), xytext=(3, 3), textcoords="offset points", fontsize=8)
    equal = list(uniform.values())
    axis.scatter([size / _KB for size, _ in equal], [f for _, f in equal], s=22, marker="s", color="C1", zorder=3, label="equal bits")
    axis.set(ylabel="fitness on calibration images")


def _points(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    axis.plot([row["size_bytes"] / _KB for row in rows], [row[key] for row in rows], "o-", color="C0", ms=3, lw=1, label="front")
    for row in rows:
        if row["selected"]:
            axis.plot(row["size_bytes"] / _KB, row[key], "*", color="C3", ms=11, zorder=4, label="selected")
