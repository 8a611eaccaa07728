"""The evaluations of a robustness analysis, part by part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qat.analysis.analysis import EvaluationPoint, StudiedNet
from qat.analysis.images import ImageSet
from qat.analysis.requantize import GridSite, WeightChange, WeightSites
from qat.analysis.robustness.corruptions import Corruption
from qat.utils.validate import FLOAT_BITS

# Parts that start from quantized weights.
OF_QUANTIZED = ("steps", "power_of_two", "quantizers")
ROUNDED = ("half_up", "floor", "stochastic")
CLIPPED = ("minmax", "percentile", "mse")
_SEEDS = 1000  # draws of one seed


@dataclass(frozen=True)
class PerturbedNet:
    """A net, and what of it is changed.

    Attributes:
        studied: the net.
        weights: all of its weights.
        resized: weights whose width the curve over widths changes.
        base: what all other changes of weights are put on top of; its bits are those that a float net is quantized to first.
    """

    studied: StudiedNet
    weights: WeightSites
    resized: tuple[GridSite, ...]
    base: WeightChange

    @property
    def label(self) -> str:
        """Of the net."""
        return self.studied.label

    @property
    def side(self) -> int:
        """Of its images, the shorter one."""
        return min(self.studied.input_size[1:])

    @property
    def is_quantized_here(self) -> bool:
        """A float net that is quantized before anything else."""
        return self.base.bits is not None

    @property
    def reference(self) -> str:
        """The part that is the net with quantized weights and no change."""
        return "quantized" if self.is_quantized_here else "clean"

    @property
    def has_steps(self) -> bool:
        """Weights are quantized, by the net itself or here."""
        return self.is_quantized_here or any(site.grid.bits < FLOAT_BITS for site in self.weights.sites)

    @property
    def width(self) -> float | None:
        """Bits of the weights whose width is changed, averaged over their entries; None where there are none."""
        total = sum(site.numel for site in self.resized)
        if not total:
            return None
        width = sum(site.grid.bits * site.numel for site in self.resized) / total
        return int(width) if width.is_integer() else width

    def resized_to(self, bits: int, change: WeightChange) -> EvaluationPoint | None:
        """The net with weights of another width; None where all have it. A weight that has it stays as it is, its trained steps too."""
        other = [site for site in self.resized if site.grid.bits != bits]
        return self._point("bits", dataclasses.replace(change, bits=bits), other, bits=bits) if other else None

    def changed(self, part: str, key: dict[str, str | float] | None = None, **change: Any) -> EvaluationPoint:
        """The net with a change of all its quantized weights."""
        sites = self.resized if self.is_quantized_here else self.weights.sites
        return self._point(part, dataclasses.replace(self.base, **change), sites, **(key or {}))

    def _point(self, part: str, change: WeightChange, sites: Sequence[GridSite], **key: str | float) -> EvaluationPoint:
        context = functools.partial(self.weights.changed, change, sites)
        return EvaluationPoint({"net": self.label, "part": part, **key}, self.weights.net, context)


def clean_points(subjects: Sequence[PerturbedNet], parts: Sequence[set[str]]) -> Iterator[EvaluationPoint]:
    """The nets as they are, and float nets once they are quantized."""
    for subject in subjects:
        yield EvaluationPoint({"net": subject.label, "part": "clean"}, subject.studied.net)
    for subject, wanted in zip(subjects, parts, strict=True):
        if subject.is_quantized_here and wanted & set(OF_QUANTIZED):
            yield subject.changed("quantized")


def step_points(subject: PerturbedNet, ratios: Sequence[float]) -> Iterator[EvaluationPoint]:
    """All steps times each ratio; at 1 it is the net without a change."""
    for ratio in ratios:
        if ratio != 1:
            yield subject.changed("steps", {"ratio": ratio}, ratio=ratio)


def bit_points(subject: PerturbedNet, widths: Sequence[int], change: WeightChange) -> Iterator[EvaluationPoint]:
    """All widths but the net's own; `change` says where steps come from."""
    for bits in dict.fromkeys(widths):
        point = subject.resized_to(bits, change)
        if point is not None:
            yield point


def policy_points(subject: PerturbedNet, draws: int, seed: int) -> Iterator[EvaluationPoint]:
    """Other roundings of the same steps, then other steps of the same width."""
    for rounding in ROUNDED:
        policy = f"{rounding.replace('_', '-')} rounding"
        for draw in range(draws if rounding == "stochastic" else 1):
            key: dict[str, str | float] = {"policy": policy, "draw": draw}
            yield subject.changed("quantizers", key, rounding=rounding, seed=seed * _SEEDS + draw)
    for rule in CLIPPED:
        yield subject.changed("quantizers", {"policy": f"{rule} clipping", "draw": 0}, steps_from=rule)


def corruption_points(
    subject: PerturbedNet, images: ImageSet, kinds: Sequence[str], severities: Sequence[int], seed: int
) -> Iterator[EvaluationPoint]:
    """The net as it is, on worse images."""
    studied = subject.studied
    for kind in dict.fromkeys(kinds):
        for severity in dict.fromkeys(severities):
            damage = Corruption(kind, severity, images.mean, images.std, seed)
            yield EvaluationPoint(
                {"net": studied.label, "part": "corruptions", "kind": kind, "severity": severity}, studied.net, images=damage
            )
