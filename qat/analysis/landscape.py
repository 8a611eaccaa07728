"""Loss of a model on a plane in the space of its weight scales. Evol-Q searches this space.

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
    PALETTE,
    SEQUENTIAL_COLORMAP,
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
from qat.analysis.requantize import requantize
from qat.errors import UsageError
from qat.functional.infonce import info_nce
from qat.model.sites import iter_quantizers
from qat.ptq.calibrate import in_float
from qat.ptq.runner import Forward, patch_forwards
from qat.quantizers import UniformGrid
from qat.utils.validate import check_choice, check_globs, check_int, check_number

LOSSES = {"ce": "Cross-entropy", "infonce": "infoNCE to the float logits"}
CONTOUR_LEVELS = 12


@dataclass(frozen=True)
class Landscape(Analysis):
    """The settings of `analysis/landscape.yaml`.

    Attributes:
        targets: globs that select the weights whose scales change, in both directions of the plane.
        points: number of points along each direction, odd and at least 3.
        radius: largest change of a scale along one direction, as a fraction of the scale.
        loss: `ce` (cross-entropy with the labels) or `infonce` (infoNCE against the logits of the
            float model).
        seed: seed of the two random directions.

    Raises:
        UsageError: a setting has a value that is not allowed.
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
        # With a radius of 0.5 or more, a scale that changes in both directions could reach zero.
        check_number("analysis.radius", self.radius, 0, exclusive_lowest=True, below=0.5)
        check_int("analysis.seed", self.seed, 0)
        targets = check_globs("analysis.targets", self.targets, "attn.*.weight")
        object.__setattr__(self, "targets", targets)

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Compute the loss at every point of each model's plane.

        Raises:
            UsageError: see `random_plane`.
        """
        middle_index = self.points // 2
        coordinates = [self.radius * (i - middle_index) / middle_index for i in range(self.points)]
        points = []
        for studied_net in nets:
            move = random_plane(studied_net.net, self.targets, self.seed)
            score = self._score_function(studied_net.net, images)
            for y, x in itertools.product(coordinates, coordinates):
                key = {"net": studied_net.label, "x": x, "y": y}
                change = functools.partial(move, x, y)
                points.append(EvaluationPoint(key, studied_net.net, change, score))
        rows = measure(points, images)
        column = "loss" if self.loss == "ce" else self.loss
        losses = torch.tensor([row[column] for row in rows], dtype=torch.float64)
        labels = [studied_net.label for studied_net in nets]
        grids = dict(zip(labels, losses.view(-1, self.points, self.points), strict=True))
        summary = {label: measure_ruggedness(grid) for label, grid in grids.items()}
        table = Table("landscape", "Loss on the plane", rows)
        return Outcome(summary, [table], [_draw_contours(grids, coordinates, LOSSES[self.loss])])

    def _score_function(self, net: nn.Module, images: ImageSet) -> Score | None:
        """Return a function that computes infoNCE with the float model's logits.

        For cross-entropy, return None: `measure` computes it by default.
        """
        if self.loss == "ce":
            return None
        with torch.no_grad(), in_float(net):
            float_logits = [net(batch) for batch, _ in images.batches]

        def score(net: nn.Module) -> dict[str, float]:
            losses = []
            for (batch, _), reference_logits in zip(images.batches, float_logits, strict=True):
                logits = net(batch)
                losses.append(info_nce(logits, reference_logits) * len(logits))
            return {"infonce": float(torch.stack(losses).double().sum()) / images.num_images}

        return score


def random_plane(
    net: nn.Module, targets: Sequence[str], seed: int
) -> Callable[[float, float], AbstractContextManager[None]]:
    """Choose a random plane through the model in the space of its weight scales.

    At the point (x, y), a scale s becomes s (1 + x u + y v), with random u and v, uniform in
    [-1, 1], for each scale. Zero points and ranges of codes are not changed.

    Args:
        net: a quantized model.
        targets: globs that are matched with `LAYER.ROLE`, or with any part of this name that
            follows a dot.
        seed: seed of u and v, which do not depend on the device.

    Returns:
        A function `move(x, y)`. Inside `with move(x, y):`, the model has the scales of this point;
        after the block, it is unchanged, bit for bit.

    Raises:
        UsageError: no weight on a uniform grid matches `targets`, or the model is frozen.
    """
    generators = [torch.Generator().manual_seed(2 * seed + direction) for direction in (0, 1)]
    directions = {}
    for site in iter_quantizers(net):
        if not site.is_weight:
            continue
        grid = site.quantizer.grid(site.latent().detach())
        # With the dot in front, a glob can also match the whole name.
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
            f"analysis.targets={list(targets)}: must match a weight on a uniform grid; "
            "names look like 'blocks.0.mlp.fc1.weight'; a float model has no such weight"
        )

    def move(x: float, y: float) -> AbstractContextManager[None]:
        forwards: dict[nn.Module, Forward] = {}
        for quantizer, (u, v) in directions.items():
            factors = 1 + (x * u + y * v)
            forwards[quantizer] = functools.partial(requantize, quantizer, resize=factors.mul)
        return patch_forwards(forwards)

    return move


def measure_ruggedness(losses: Tensor) -> dict[str, float]:
    """Measure how rugged a grid (n, n) of losses is; n is odd and at least 3.

    Returns:
        `centre`, `lowest` and `highest` loss; `roughness`, the mean magnitude of second differences
        along the lines of the grid; `relative_roughness`, roughness / (highest - lowest), about
        4 / (n - 1)^2 for a smooth bowl, 0 if all losses are equal; `local_minima`, the number of
        points whose loss is below that of all (up to eight) neighbours. Claim C10 in
        docs/accuracy.md compares these numbers.
    """
    lowest = float(losses.min())
    highest = float(losses.max())
    middle = len(losses) // 2
    roughness = float(torch.cat([losses, losses.T]).diff(n=2, dim=1).abs().mean())
    padded_losses = F.pad(losses, (1, 1, 1, 1), value=torch.inf)
    windows = padded_losses.unfold(0, 3, 1).unfold(1, 3, 1).flatten(2)  # (n, n, 9)
    windows[..., 4] = torch.inf  # exclude the point itself
    return {
        "centre": float(losses[middle, middle]),
        "lowest": lowest,
        "highest": highest,
        "roughness": roughness,
        "relative_roughness": roughness / (highest - lowest) if highest > lowest else 0.0,
        "local_minima": int((losses < windows.amin(-1)).sum()),
    }


def _draw_contours(grids: Mapping[str, Tensor], coordinates: Sequence[float], loss: str) -> Drawing:
    """Draw lines of equal loss with a colour scale per model; a cross marks the unchanged model."""
    figure, axes = panels(1, len(grids), width=max(3.6 * len(grids), 4.8))
    descriptions = []
    for panel, (label, losses) in zip(axes, grids.items(), strict=True):
        centre = float(losses[len(coordinates) // 2, len(coordinates) // 2])
        loss_changes = (losses - centre).numpy()
        filled_contours = panel.contourf(
            coordinates, coordinates, loss_changes, levels=CONTOUR_LEVELS, cmap=SEQUENTIAL_COLORMAP
        )
        panel.contour(
            coordinates,
            coordinates,
            loss_changes,
            levels=CONTOUR_LEVELS,
            colors="black",
            linewidths=0.4,
            linestyles="solid",
        )
        panel.plot(0, 0, "+", color=PALETTE[1], markersize=11, markeredgewidth=2)
        panel.set(xlabel="direction 1", ylabel="direction 2", aspect="equal")
        panel.grid(visible=False)
        panel.set_title(f"{label}\nloss {centre:.4f} in the middle", fontsize=9, loc="left")
        panel.locator_params(nbins=5)
        colorbar = figure.colorbar(filled_contours, ax=panel, shrink=0.8, ticks=MaxNLocator(5))
        colorbar.ax.tick_params(labelsize=7)
        descriptions.append(
            f"{label}: {centre:.4f} in the middle, "
            f"from {loss_changes.min():+.4f} to {loss_changes.max():+.4f}"
        )
    title = f"{loss}: difference from the unchanged model (+); axes: relative change of scales"
    return Drawing("landscape", title, "; ".join(descriptions), figure)
