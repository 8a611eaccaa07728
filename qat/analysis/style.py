"""How pictures look: colours that colour-blind eyes tell apart, sizes that are legible 720 pixels wide, quiet axes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito, 2008 ("Color Universal Design"), the yellow left out: it is too pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#767676"
# From white to dark blue: also in grey, darker is more.
HEAT = "Blues"
WIDTH = 7.2  # inches; 720 pixels at 100 a inch


def figure(width: float = WIDTH, height: float = 3.6) -> Figure:
    """An empty figure, its parts kept from overlapping; inches."""
    return Figure(figsize=(width, height), layout="constrained")


def axes(of: Figure, xlabel: str = "", ylabel: str = "") -> Axes:
    """The one pair of axes of a figure."""
    return quiet(of.add_subplot(), xlabel, ylabel)


def panels(of: Figure, rows: int, columns: int, *, sharex: bool = False, sharey: bool = False) -> list[Axes]:
    """A grid of axes, row by row."""
    grid = of.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return [quiet(axis) for axis in grid.flat]


def quiet(axis: Axes, xlabel: str = "", ylabel: str = "") -> Axes:
    """Two spines, a pale grid behind the data, labels of a size that stays legible."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#E6E6E6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=3)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    return axis


def colours() -> Iterator[str]:
    """The palette, over and over."""
    return cycle(PALETTE)
