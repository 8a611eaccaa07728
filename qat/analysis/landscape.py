"""Loss of a model on a plane of weight scales, in which a scale search would move.

Source: Evol-Q, arXiv 2308.10814, figure of the loss over scales. Docs: docs/analysis.md.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn import functional as F

from qat.analysis.analysis import (
    HEAT,
    PALETTE,
    Analysis,
    Drawing,
    EvaluationPoint,
    ImageSet,
    Outcome,
    Score,
    StudiedNet,
    Table,
    measure,
    panels,
)
from qat.analysis.requantize import requantized
from qat.errors import UsageError
from qat.functional.infonce import info_nce
from qat.model.sites import iter_quantizers
from qat.ptq.calibrate import in_float
from qat.ptq.runner import Forward, patched
from qat.quantizers import UniformGrid
from qat.utils.validate import check_choice, check_globs, check_int, check_number

LOSSES = {"ce": "Cross-entropy", "infonce": "infoNCE to the float logits"}
LEVELS = 12


@dataclass(frozen=True)
class Landscape(Analysis):
    """The settings of `analysis/landscape.yaml`.

    Attributes:
        targets: globs of weights whose scales move in both directions.
        points: number of points along each direction, odd.
        radius: largest change of a scale in a direction, as a fraction of the scale.
        loss: `ce` (cross-entropy of labels) or `infonce` (compared with the logits of the float
            model).
        seed: seed of the directions.

    Raises:
        UsageError: a setting has a value that cannot work.
    """

    targets: Sequence[str] = ("*",)
    points: int = 21
    radius: float = 0.1
    loss: str = "ce"
    seed: int = 0

    name: ClassVar[str] = "landscape"
    split: ClassVar[str | None] = "val"

    def __post_init__(self) -> None:
        check_choice("analysis.loss", self.loss, tuple(LOSSES))
        check_int("analysis.points", self.points, 3)
        if self.points % 2 == 0:
            raise UsageError(
                f"analysis.points={self.points}: must be odd, "
                "so that the unchanged model is the middle point"
            )
        # From 0.5 on, a scale that changes in both directions could reach zero.
        check_number("analysis.radius", self.radius, 0, exclusive_lowest=True, below=0.5)
        check_int("analysis.seed", self.seed, 0)
        targets = check_globs("analysis.targets", self.targets, "attn.*.weight")
        object.__setattr__(self, "targets", targets)

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Evaluate every point of the plane of every model."""
        half = self.points // 2
        coordinates = [self.radius * (i - half) / half for i in range(self.points)]
        points = []
        for studied in nets:
            move = plane(studied.net, self.targets, self.seed)
            score = self._score(studied.net, images)
            for y, x in itertools.product(coordinates, coordinates):
                key = {"net": studied.label, "x": x, "y": y}
                change = functools.partial(move, x, y)
                points.append(EvaluationPoint(key, studied.net, change, score))
        rows = measure(points, images)
        column = "loss" if self.loss == "ce" else self.loss
        losses = torch.tensor([row[column] for row in rows], dtype=torch.float64)
        labels = [studied.label for studied in nets]
        grids = dict(zip(labels, losses.view(-1, self.points, self.points), strict=True))
        summary = {label: shape_of(grid) for label, grid in grids.items()}
        table = Table("landscape", "Loss on the plane", rows)
        return Outcome(summary, [table], [_contours(grids, coordinates, LOSSES[self.loss])])

    def _score(self, net: nn.Module, images: ImageSet) -> Score | None:
        """The infoNCE loss against the logits of the float model; None for cross-entropy."""
        if self.loss == "ce":
            return None
        with torch.no_grad(), in_float(net):
            float_logits = [net(batch) for batch, _ in images.batches]

        def score(net: nn.Module) -> dict[str, float]:
            losses = []
            for (batch, _), expected in zip(images.batches, float_logits, strict=True):
                logits = net(batch)
                losses.append(info_nce(logits, expected) * len(logits))
            return {"infonce": float(torch.stack(losses).double().sum()) / images.n_images}

        return score


def plane(
    net: nn.Module, targets: Sequence[str], seed: int
) -> Callable[[float, float], AbstractContextManager[None]]:
    """A plane of scales: scale s becomes s (1 + x u + y v) with u and v uniform in [-1, 1].

    Zero points and ranges of codes are not changed.

    Args:
        net: a quantized model.
        targets: globs that are matched with `LAYER.ROLE`, or with any part of it that follows a
            dot.
        seed: seed of the directions, which do not depend on the device.

    Returns:
        `move(x, y)`, which returns a context in which the model is at this point of the plane.
        Afterwards the model is unchanged, bit for bit.

    Raises:
        UsageError: no weight is matched.
    """
    generators = [torch.Generator().manual_seed(2 * seed + direction) for direction in (0, 1)]
    directions = {}
    for site in iter_quantizers(net):
        if not site.is_weight:
            continue
        grid = site.quantizer.grid(site.latent().detach())
        name = f".{site.layer}.{site.role}"
        is_target = any(fnmatch.fnmatch(name, f"*.{glob}") for glob in targets)
        if not is_target or not isinstance(grid, UniformGrid):
            continue
        directions[site.quantizer] = [
            2 * torch.rand(len(grid.step), generator=generator).to(grid.step) - 1
            for generator in generators
        ]
    if not directions:
        raise UsageError(
            f"analysis.targets={list(targets)}: must match a quantized weight; "
            "names look like 'blocks.0.mlp.fc1.weight'"
        )

    def move(x: float, y: float) -> AbstractContextManager[None]:
        forwards: dict[nn.Module, Forward] = {}
        for quantizer, (u, v) in directions.items():
            factors = 1 + (x * u + y * v)
            forwards[quantizer] = functools.partial(requantized, quantizer, resize=factors.mul)
        return patched(forwards)

    return move


def shape_of(losses: Tensor) -> dict[str, float]:
    """Ruggedness of a grid (n, n) of losses, n odd and at least 3.

    Returns:
        `centre`, `lowest` and `highest` loss; `roughness`, the mean magnitude of second differences
        along the lines of the grid; `relative_roughness`, roughness / (highest - lowest), about
        4 / (n - 1)^2 for a smooth bowl; `local_minima`, the number of points below all of their
        neighbours (up to eight). Claim C10 compares these numbers.
    """
    low = float(losses.min())
    high = float(losses.max())
    middle = len(losses) // 2
    roughness = float(torch.cat([losses, losses.T]).diff(n=2, dim=1).abs().mean())
    padded = F.pad(losses, (1, 1, 1, 1), value=torch.inf)
    windows = padded.unfold(0, 3, 1).unfold(1, 3, 1).flatten(2)  # (n, n, 9)
    windows[..., 4] = torch.inf  # the point itself
    return {
        "centre": float(losses[middle, middle]),
        "lowest": low,
        "highest": high,
        "roughness": roughness,
        "relative_roughness": roughness / (high - low) if high > low else 0.0,
        "local_minima": int((losses < windows.amin(-1)).sum()),
    }


def _contours(grids: Mapping[str, Tensor], coordinates: Sequence[float], loss: str) -> Drawing:
    """Lines of equal loss, with a colour scale per model, and a cross at the unchanged model."""
    figure, axes = panels(1, len(grids), width=max(3.6 * len(grids), 4.8))
    descriptions = []
    for axis, (label, losses) in zip(axes, grids.items(), strict=True):
        centre = float(losses[len(coordinates) // 2, len(coordinates) // 2])
        rises = (losses - centre).numpy()
        areas = axis.contourf(coordinates, coordinates, rises, levels=LEVELS, cmap=HEAT)
        axis.contour(
            coordinates,
            coordinates,
            rises,
            levels=LEVELS,
            colors="black",
            linewidths=0.4,
            linestyles="solid",
        )
        axis.plot(0, 0, "+", color=PALETTE[1], markersize=11, markeredgewidth=2)
        axis.set(xlabel="direction 1", ylabel="direction 2", aspect="equal")
        axis.grid(visible=False)
        axis.set_title(f"{label}\nloss {centre:.4f} in the middle", fontsize=9, loc="left")
        axis.locator_params(nbins=5)
        colorbar = figure.colorbar(areas, ax=axis, shrink=0.8, ticks=MaxNLocator(5))
        colorbar.ax.tick_params(labelsize=7)
        descriptions.append(
            f"{label}: {centre:.4f} in the middle, from {rises.min():+.4f} to {rises.max():+.4f}"
        )
    title = f"{loss} above that of the unchanged model (+), scales changed by a fraction"
    return Drawing("landscape", title, "; ".join(descriptions), figure)
