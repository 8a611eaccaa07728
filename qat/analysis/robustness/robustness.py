"""How much of its accuracy a net keeps when weights are quantized otherwise than it was trained or calibrated for, or images are worse.

Protocol: KURE, arXiv 2002.07686 (steps, widths, powers of two). Conventions: docs/analysis.md, section Robustness.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from qat.analysis.analysis import Advice, Analysis, EvaluationPoint, Outcome, Row, StudiedNet
from qat.analysis.grids import STEPS_FROM
from qat.analysis.images import ImageSet
from qat.analysis.requantize import GridSite, WeightChange, WeightSites, weight_sites
from qat.analysis.robustness.corruptions import JPEG_CHANNELS, KINDS, SEVERITIES
from qat.analysis.robustness.evaluations import (
    OF_QUANTIZED,
    PerturbedNet,
    bit_points,
    clean_points,
    corruption_points,
    policy_points,
    step_points,
)
from qat.analysis.robustness.findings import RobustnessResults
from qat.errors import UsageError
from qat.utils.validate import FLOAT_BITS, check_bits, check_choice, check_int, check_number

log = logging.getLogger(__name__)
PARTS = ("steps", "bits", "power_of_two", "corruptions", "quantizers")
FLOAT_SCALES = {"channel": 0, "tensor": None}
EDGES = ("keep", "change")


@dataclass(frozen=True)
class Robustness(Analysis):
    """The settings of `analysis/robustness.yaml`.

    Attributes:
        parts: some of `PARTS`; None = all that the nets allow.
        low: lowest factor on the steps.
        high: highest.
        ratios: how many factors, evenly spaced, both ends among them.
        bits: widths of the weights, 32 = float.
        steps_from: where steps of other widths come from, one of `STEPS_FROM`.
        stem_and_head: `keep` the first convolution and the classifiers as they are when widths change, or `change` them too; None =
            change them where a net quantizes them to the width of its blocks.
        float_bits: width to which float nets are quantized for the parts that start from quantized weights; None = those are left out.
        float_scales: float weights get steps per `channel` or per `tensor`.
        corruptions: some of `KINDS`; None = all.
        severities: of 1 to 5.
        draws: how often weights are rounded stochastically.
        percentile: share of the entries of a slice that clipping by percentile leaves below the upper end of the range.
        seed: of noise on images and of stochastic rounding.

    Raises:
        UsageError: a setting has a value that cannot work.
    """

    parts: Sequence[str] | None = None
    low: float = 0.7
    high: float = 1.3
    ratios: int = 21
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8, FLOAT_BITS)
    steps_from: str = "own"
    stem_and_head: str | None = None
    float_bits: int | None = None
    float_scales: str = "channel"
    corruptions: Sequence[str] | None = None
    severities: Sequence[int] = (1, 3, 5)
    draws: int = 3
    percentile: float = 0.999
    seed: int = 0

    name: ClassVar[str] = "robustness"

    def __post_init__(self) -> None:
        for field, allowed in (("parts", PARTS), ("corruptions", KINDS)):
            if getattr(self, field) is not None:
                _check_list(f"analysis.{field}", getattr(self, field), ", ".join(allowed))
                for value in getattr(self, field):
                    check_choice(f"analysis.{field}", value, allowed)
        check_number("analysis.low", self.low, 0, above=True)
        check_number("analysis.high", self.high, self.low, above=True)
        check_int("analysis.ratios", self.ratios, 2)
        _check_list("analysis.bits", self.bits, "whole numbers from 2 to 8, and 32")
        for bits in self.bits:
            check_bits("analysis.bits", bits, "float")
        check_choice("analysis.steps_from", self.steps_from, STEPS_FROM)
        if self.stem_and_head is not None:
            check_choice("analysis.stem_and_head", self.stem_and_head, EDGES)
        if self.float_bits is not None:
            check_bits("analysis.float_bits", self.float_bits)
        check_choice("analysis.float_scales", self.float_scales, tuple(FLOAT_SCALES))
        _check_list("analysis.severities", self.severities, "whole numbers from 1 to 5")
        for severity in self.severities:
            check_int("analysis.severities", severity, SEVERITIES[0], SEVERITIES[-1])
        check_int("analysis.draws", self.draws, 1)
        check_number("analysis.percentile", self.percentile, 0.5, above=True, highest=1)
        check_int("analysis.seed", self.seed, 0)

    def points(self, nets: Sequence[StudiedNet], images: ImageSet) -> list[EvaluationPoint]:
        """The nets as they are, then part by part.

        Raises:
            UsageError: a part that was asked for by name cannot be had of one of the nets.
        """
        subjects = [self.subject(net) for net in nets]
        for subject in subjects:
            self._check_parts(subject)
        found = list(clean_points(subjects, [self._parts(subject) for subject in subjects]))
        for part in PARTS:
            for subject in subjects:
                if part in self._parts(subject):
                    found += self._points_of(part, subject, images)
        return found

    def outcome(self, nets: Sequence[StudiedNet], rows: Sequence[Row]) -> Outcome:
        """Curves, their figures, and what stands out."""
        subjects = [self.subject(net) for net in nets]
        warnings = [advice for subject in subjects for advice in self._advice(subject)]
        return RobustnessResults(subjects, rows, self.factors(), self.bits, self.severities).outcome(warnings)

    def factors(self) -> list[float]:
        """The factors on the steps; what a table shows of them is what they are."""
        return [round(value, 6) for value in torch.linspace(float(self.low), float(self.high), self.ratios, dtype=torch.float64).tolist()]

    def subject(self, studied: StudiedNet) -> PerturbedNet:
        """What of a net is changed."""
        weights = weight_sites(studied.net, studied.input_size, FLOAT_SCALES[self.float_scales])
        resized = tuple(site for site in weights.sites if self._resizes(site, weights))
        base = WeightChange(percentile=self.percentile)
        if weights.is_float and self.float_bits is not None and resized:
            base = WeightChange(bits=self.float_bits, steps_from=self.steps_from, percentile=self.percentile)
        return PerturbedNet(studied, weights, resized, base)

    def _resizes(self, site: GridSite, weights: WeightSites) -> bool:
        if not weights.is_float and site.grid.bits == FLOAT_BITS:
            return False  # somebody wanted it so
        if site.place == "block" or self.stem_and_head == "change":
            return True
        blocks = {other.grid.bits for other in weights.sites if other.place == "block"}
        return self.stem_and_head is None and not weights.is_float and blocks == {site.grid.bits}

    def _parts(self, subject: PerturbedNet) -> set[str]:
        """What can be done to a net, of what is wanted."""
        parts = set(PARTS if self.parts is None else self.parts)
        if not subject.has_steps:
            parts -= set(OF_QUANTIZED)
        return parts if subject.resized else parts - {"bits"}

    def _left_out(self, subject: PerturbedNet) -> str:
        return ", ".join(part for part in self.parts or PARTS if part not in self._parts(subject))

    def _check_parts(self, subject: PerturbedNet) -> None:
        left = self._left_out(subject)
        if left and self.parts is not None:
            raise UsageError(f"analysis.parts={list(self.parts)}: {_why_not(subject, left)}")
        if left:
            log.info("%s", _why_not(subject, left))

    def _points_of(self, part: str, subject: PerturbedNet, images: ImageSet) -> Iterable[EvaluationPoint]:
        if part == "steps":
            return step_points(subject, self.factors())
        if part == "bits":
            return bit_points(subject, self.bits, WeightChange(steps_from=self.steps_from, percentile=self.percentile))
        if part == "power_of_two":
            return [subject.changed(part, steps="power_of_two")]
        if part == "quantizers":
            return policy_points(subject, self.draws, self.seed)
        return corruption_points(subject, images, self._kinds(subject), self.severities, self.seed)

    def _kinds(self, subject: PerturbedNet) -> list[str]:
        channels = subject.studied.input_size[0]
        kinds = [kind for kind in self.corruptions or KINDS if kind != "jpeg" or channels in JPEG_CHANNELS]
        if self.corruptions is not None and len(kinds) < len(self.corruptions):
            raise UsageError(
                f"analysis.corruptions={list(self.corruptions)}: images have {channels} channels; for jpeg it must be one of 1, 3"
            )
        return kinds

    def _advice(self, subject: PerturbedNet) -> Iterator[Advice]:
        label, unknown = subject.label, subject.weights.left_alone
        if left := self._left_out(subject):
            what, _, fix = _why_not(subject, left).partition("; ")
            yield Advice(label, what, fix)
        if unknown:
            yield Advice(
                label, f"stayed as they are in every change: {', '.join(unknown)}", "quantize them with a quantizer of this package"
            )


def _why_not(subject: PerturbedNet, left: str) -> str:
    """One line about parts that cannot be had of a net."""
    if subject.weights.is_float:
        return f"{subject.label} has no quantized weights for {left}; analysis.float_bits=4 quantizes them first"
    allowed = "must be one of statsq, lsq, minmax and those of ptq.py"
    return f"{subject.label} has no weights on a grid that is known for {left}; {allowed}"


def _check_list(setting: str, value: object, allowed: str) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"{setting}={value!r}: must be a list of {allowed}")
