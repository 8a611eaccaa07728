"""Pictures of a loss on a plane: contours and surfaces, nets beside each other on one range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from qat.analysis.analysis import Drawing
from qat.analysis.style import HEAT, PALETTE, WIDTH, figure, panels

COLUMNS = 2
LEVELS = 12
MARK = PALETTE[1]


@dataclass(frozen=True)
class Panel:
    """One net.

    Attributes:
        label: what it is called.
        places: coordinates of the points along each direction.
        losses: (y, x).
    """

    label: str
    places: Sequence[float]
    losses: Tensor

    @property
    def rises(self) -> Tensor:
        """Loss above that in the middle; NaN where it is not finite."""
        middle = len(self.places) // 2
        rises = self.losses - self.losses[middle, middle]
        return torch.where(rises.isfinite(), rises, torch.nan)

    @property
    def title(self) -> str:
        """Name, and what heights are counted from."""
        middle = len(self.places) // 2
        return f"{self.label} (loss {float(self.losses[middle, middle]):.4f} in the middle)"


def draw_contours(shown: Sequence[Panel], directions: tuple[str, str], unit: str, loss: str) -> Drawing:
    """Lines of equal loss, each net on a range of its own; the lowest point and the net as it is."""
    rows, columns = _layout(shown)
    of = figure(WIDTH, (2.9 if columns > 1 else 4.6) * rows)
    drawn = panels(of, rows, columns)
    for axis, panel in zip(drawn, shown, strict=False):
        low, high = _range([panel])
        levels = torch.linspace(low, high, LEVELS + 1).tolist()
        filled = axis.contourf(panel.places, panel.places, panel.rises.numpy(), levels=levels, cmap=HEAT)
        axis.contour(panel.places, panel.places, panel.rises.numpy(), levels=levels, colors="black", linewidths=0.4, linestyles="solid")
        x, y = _lowest(panel)
        axis.plot(x, y, marker="v", color=MARK, markeredgecolor="white", markersize=8, linestyle="none")
        axis.plot(0, 0, marker="+", color=MARK, markersize=11, markeredgewidth=2, linestyle="none")
        _name(axis, panel, directions)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_aspect("equal")
        axis.grid(visible=False)
        bar = of.colorbar(filled, ax=axis, shrink=0.8, ticks=MaxNLocator(5))
        bar.ax.tick_params(labelsize=7)
    for axis in drawn[len(shown) :]:
        axis.remove()
    title = f"{_spoken(loss)} above that of the net as it is ({unit}); + the net as it is, triangle the lowest point"
    return Drawing("landscape", title, _told(shown, "Contours"), of)


def draw_surfaces(shown: Sequence[Panel], directions: tuple[str, str], unit: str, loss: str) -> Drawing:
    """The same as hills and valleys."""
    low, high = _range(shown)
    rows, columns = _layout(shown)
    of = figure(WIDTH, (3.4 if columns > 1 else 5.2) * rows)
    for number, panel in enumerate(shown):
        axis = of.add_subplot(rows, columns, number + 1, projection="3d")
        places = torch.tensor(panel.places)
        y, x = torch.meshgrid(places, places, indexing="ij")
        axis.plot_surface(
            *(t.numpy() for t in (x, y, panel.rises)),
            cmap=HEAT,
            vmin=low - 0.3 * (high - low),
            vmax=high,
            edgecolor="#404040",
            linewidth=0.25,
        )
        axis.set_zlim(low, high)
        axis.tick_params(labelsize=7, pad=0)
        axis.tick_params(axis="z", pad=3)
        for ticks in (axis.xaxis, axis.yaxis, axis.zaxis):
            ticks.set_major_locator(MaxNLocator(4))
        _name(axis, panel, directions)
        axis.set_zlabel("")
    return Drawing("landscape_surface", f"{_spoken(loss)} above that of the net as it is ({unit})", _told(shown, "Surfaces"), of)


def _name(axis: Axes, panel: Panel, directions: tuple[str, str]) -> None:
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_xlabel(directions[0], fontsize=8)
    axis.set_ylabel(directions[1], fontsize=8)


def _spoken(loss: str) -> str:
    return "Cross-entropy" if loss == "ce" else "infoNCE to the float logits"


def _layout(shown: Sequence[Panel]) -> tuple[int, int]:
    columns = min(COLUMNS, len(shown))
    return -(-len(shown) // columns), columns


def _range(shown: Sequence[Panel]) -> tuple[float, float]:
    """Of all nets, so that heights compare; never empty."""
    values = torch.cat([panel.rises.flatten() for panel in shown])
    values = values[~values.isnan()]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    return low, max(high, low + 1e-9)


def _lowest(panel: Panel) -> tuple[float, float]:
    row, column = divmod(int(panel.rises.nan_to_num(nan=torch.inf).argmin()), len(panel.places))
    return panel.places[column], panel.places[row]


def _told(shown: Sequence[Panel], kind: str) -> str:
    told = []
    for panel in shown:
        values = panel.rises[~panel.rises.isnan()]
        x, y = _lowest(panel)
        told.append(
            f"{panel.title}: from {float(values.min()):+.4f} at ({x:+.3g}, {y:+.3g}) to {float(values.max()):+.4f}"
            if len(values)
            else panel.title
        )
    return f"{kind} on {len(shown[0].places)} x {len(shown[0].places)} points. {'; '.join(told)}."
