"""The loss around a net, on a plane of its scales or of its weights: how smooth it is where a search or a training walks.

Sources: Evol-Q, arXiv 2308.10814, figure of the loss over scales; Li et al., arXiv 1712.09913, for weights. Docs: docs/analysis.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.analysis.base import Advice, Analysis, Outcome, Point, Row, StudiedNet, Table
from qat.analysis.images import ImageSet
from qat.analysis.landscape_directions import Axes, Globs, has_both, scale_axes, weight_axes
from qat.analysis.landscape_drawing import Panel, draw_contours, draw_surfaces
from qat.analysis.landscape_shape import grid_of_rows, ordered, positions, shape_of
from qat.analysis.requantize import weight_sites
from qat.conversion import conversion_of
from qat.errors import UsageError
from qat.functional.infonce import TEMPERATURE, info_nce
from qat.ptq.calibrate import in_float
from qat.spec import check_choice, check_int, check_number

SPACES = {"scales": 0.1, "weights": 1.0}
CE, INFONCE = "ce", "infonce"
ATTENTION_AND_MLP: tuple[Globs, Globs] = (("attn.*.weight", "attn.qk"), ("mlp.*.weight",))
ALL_WEIGHTS: Globs = ("*.weight", "*.qk")
# Beyond this a scale could come near zero where both directions are in it.
MOST_OF_A_SCALE = 0.5


@dataclass(frozen=True)
class Landscape(Analysis):
    """The knobs of `analysis/landscape.yaml`.

    Attributes:
        space: `scales` or `weights`.
        targets: what moves, globs as `search.targets` has them: one entry for both directions, or two; None = attention and MLP in
            a space of scales, where all nets have both, else all weights for both directions.
        side: points along each direction, odd; the setting is called `points`.
        radius: of scales as a fraction of each, of weights in units of each row's norm; None = 0.1, and 1.
        loss: `ce` or `infonce`.
        temperature: of `infonce`.
        seed: of the directions.

    Raises:
        UsageError: a value that cannot work.
    """

    space: str = "scales"
    targets: Sequence[str | Sequence[str]] | None = None
    side: int = field(default=21, metadata={"setting": "points"})
    radius: float | None = None
    loss: str = CE
    temperature: float = TEMPERATURE
    seed: int = 0

    name: ClassVar[str] = "landscape"
    split: ClassVar[str | None] = "val"

    def __post_init__(self) -> None:
        check_choice("analysis.space", self.space, tuple(SPACES))
        check_choice("analysis.loss", self.loss, (CE, INFONCE))
        check_int("analysis.points", self.side, 3)
        if self.side % 2 == 0:
            raise UsageError(f"analysis.points={self.side}: must be odd numbers, so that the net as it is lies in the middle")
        if self.radius is not None:
            check_number("analysis.radius", self.radius, 0, above=True, below=MOST_OF_A_SCALE if self.space == "scales" else torch.inf)
        check_number("analysis.temperature", self.temperature, 0, above=True)
        check_int("analysis.seed", self.seed, 0)
        if self.targets is not None:
            self._check_targets(self.targets)

    @staticmethod
    def _check_targets(targets: Any) -> None:
        entries = targets if isinstance(targets, list | tuple) else []
        fine = [isinstance(e, str) or (isinstance(e, list | tuple) and e and all(isinstance(g, str) for g in e)) for e in entries]
        if len(entries) not in {1, 2} or not all(fine):
            raise UsageError(f"analysis.targets={targets!r}: must be a list of one or two entries, each a glob or a list of globs")

    @property
    def reach(self) -> float:
        """The radius in force."""
        return SPACES[self.space] if self.radius is None else self.radius

    def points(self, nets: Sequence[StudiedNet], images: ImageSet) -> list[Point]:
        """Every point of the plane of every net, coarse grids first."""
        targets = self._targets(nets)
        planes = [self._axes(studied, targets) for studied in nets]
        scores = [self._score(axes.net, images) for axes in planes]
        places = positions(self.side, self.reach)
        return [
            Point(
                {"net": studied.label, "x": places[i], "y": places[j]},
                axes.net,
                functools.partial(axes.move, places[i], places[j]),
                score=score,
            )
            for i, j in ordered(self.side)
            for studied, axes, score in zip(nets, planes, scores, strict=True)
        ]

    def outcome(self, nets: Sequence[StudiedNet], rows: Sequence[Row]) -> Outcome:
        """Contours and surfaces of all nets, and how rugged each is."""
        figure = "loss" if self.loss == CE else INFONCE
        panels, shapes, warnings = [], [], self._left_alone(nets)
        for studied in nets:
            own = [row for row in rows if row["net"] == studied.label]
            found = grid_of_rows(own, self.side, self.reach, figure)
            if found is None:
                warnings.append(Advice(studied.label, "not enough points for a grid", "run the same command again: it goes on"))
                continue
            places, losses = found
            shapes.append({"net": studied.label, "points along a direction": len(places), **asdict(shape_of(losses))})
            panels.append(Panel(studied.label, places, losses))
            if not bool(losses.isfinite().all()):
                warnings.append(Advice(studied.label, "the loss is not finite somewhere", "take a smaller analysis.radius"))
        directions = self._named(self._targets(nets))
        unit = "scales, change as a fraction" if self.space == "scales" else "weights, filter-normalised"
        drawings = [draw(panels, directions, unit, self.loss) for draw in (draw_contours, draw_surfaces)] if panels else []
        tables = [Table("landscape", "Loss on the plane", list(rows)), Table("landscape_shape", "How rugged the loss is", shapes)]
        summary = {row["net"]: {key: value for key, value in row.items() if key != "net"} for row in shapes}
        return Outcome(summary | {"directions": list(directions)}, tables, drawings, warnings)

    def _left_alone(self, nets: Sequence[StudiedNet]) -> list[Advice]:
        return [
            Advice(f"{studied.label}: {name}", "nothing is known of its weight quantizer", "its scales stayed where they are")
            for studied in nets
            if self.space == "scales"
            for name in weight_sites(studied.net, studied.input_size).left_alone
        ]

    def _targets(self, nets: Sequence[StudiedNet]) -> tuple[Globs, Globs]:
        if self.targets is None:
            both = self.space == "scales" and all(has_both(studied.net, ATTENTION_AND_MLP) for studied in nets)
            return ATTENTION_AND_MLP if both else (ALL_WEIGHTS, ALL_WEIGHTS)
        entries = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in self.targets]
        return entries[0], entries[-1]

    @staticmethod
    def _named(targets: tuple[Globs, Globs]) -> tuple[str, str]:
        """The directions in words."""
        if targets == ATTENTION_AND_MLP:
            return "attention", "MLP"
        first, second = ("all weights" if globs == ALL_WEIGHTS else " ".join(globs) for globs in targets)
        return (f"{first}, direction 1", f"{second}, direction 2") if first == second else (first, second)

    def _axes(self, studied: StudiedNet, targets: tuple[Globs, Globs]) -> Axes:
        if self.space == "weights":
            return weight_axes(studied.net, targets, self.seed)
        if conversion_of(studied.net) is None:
            raise UsageError(f"analysis.space='scales': {studied.label} is not quantized and has none; must be weights")
        return scale_axes(studied.net, studied.input_size, targets, self.seed)

    def _score(self, net: nn.Module, images: ImageSet) -> Callable[[nn.Module, ImageSet], dict[str, float]] | None:
        if self.loss == CE:
            return None
        with torch.no_grad(), in_float(net):
            wanted = [net(batch) for batch, _ in images.batches]
        return functools.partial(_with_info_nce, wanted, self.temperature)


def _with_info_nce(wanted: Sequence[Tensor], temperature: float, net: nn.Module, images: ImageSet) -> dict[str, float]:
    """Top-1, cross-entropy, and the mean over images of infoNCE to the logits `wanted` of each batch."""
    kept: list[Tensor] = []

    def predict(batch: Tensor) -> Tensor:
        kept.append(net(batch))
        return kept[-1]

    found = images.score(predict)
    losses = [info_nce(q, k, temperature) * len(q) for q, k in zip(kept, wanted, strict=True)]
    return found | {INFONCE: float(torch.stack(losses).double().sum()) / images.n_images}
