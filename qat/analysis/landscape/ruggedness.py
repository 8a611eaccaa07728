"""A loss on a grid: how rugged it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.analysis.analysis import Row


@dataclass(frozen=True)
class Ruggedness:
    """Figures of a landscape; two of them compare if they were measured on the same number of points and with the same radius.

    Attributes:
        centre: loss of the net as it is.
        lowest, highest: loss.
        roughness: mean magnitude of second differences of neighbouring points along the lines of the grid.
        relative_roughness: roughness over highest - lowest; a smooth bowl has about 4 / (points - 1)^2.
        local_minima: points below all of their up to eight neighbours.
    """

    centre: float
    lowest: float
    highest: float
    roughness: float
    relative_roughness: float
    local_minima: int


def shape_of(losses: Tensor) -> Ruggedness:
    """Figures of a full grid (n, n), n odd from 3."""
    lines = torch.cat([losses, losses.T])
    roughness = float(lines.diff(n=2, dim=1).abs().mean())
    low, high = float(losses.min()), float(losses.max())
    middle = len(losses) // 2
    relative = roughness / (high - low) if high > low else 0.0
    return Ruggedness(float(losses[middle, middle]), low, high, roughness, relative, local_minima(losses))


def local_minima(losses: Tensor) -> int:
    """Number of points below all of their neighbours, also diagonal ones; at the edge there are fewer. Part of a plain is none."""
    padded = F.pad(losses, (1, 1, 1, 1), value=torch.inf)
    n, m = losses.shape
    around = [padded[1 + dy : 1 + dy + n, 1 + dx : 1 + dx + m] for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    return int((losses < torch.stack(around).amin(0)).sum())


def positions(points: int, radius: float) -> list[float]:
    """Evenly spaced from -radius to radius; the middle one is 0."""
    half = points // 2
    return [radius * (i - half) / half for i in range(points)]


def ordered(points: int) -> list[tuple[int, int]]:
    """All points of the grid, coarse grids first, so that what an interruption leaves can be drawn."""
    strides = _strides(points)

    def rank(at: tuple[int, int]) -> int:
        return next(i for i, stride in enumerate(strides) if not (at[0] % stride or at[1] % stride))

    return sorted(((i, j) for i in range(points) for j in range(points)), key=rank)


def grid_of_rows(rows: Sequence[Row], points: int, radius: float, figure: str) -> tuple[list[float], Tensor] | None:
    """The finest evenly spaced grid with the middle in it of which every point was evaluated: positions, losses (y, x); None for none."""
    known = {(row["x"], row["y"]): row[figure] for row in rows}
    places = positions(points, radius)
    for stride in reversed(_strides(points)):
        chosen = places[::stride]
        if all((x, y) in known for x in chosen for y in chosen):
            return chosen, torch.tensor([[known[x, y] for x in chosen] for y in chosen], dtype=torch.float64)
    return None


def _strides(points: int) -> list[int]:
    """Steps that lead from the edge over the middle to the other edge, coarse ones first."""
    half = points // 2
    return [stride for stride in range(half, 0, -1) if half % stride == 0]
