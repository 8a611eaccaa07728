"""How much each part of a net suffers from its quantization, and which bits each should have under a size. Docs: docs/analysis.md."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qat.analysis.analysis import Analysis, EvaluationPoint, Outcome, Row, StudiedNet
from qat.analysis.grids import STEPS_FROM
from qat.analysis.images import ImageSet
from qat.analysis.sensitivity.findings import AS_IS, BITS, FLOAT, ONLY, SUGGESTED, UNIFORM, WITHOUT, SensitivityResults, sensitivity_outcome
from qat.analysis.sensitivity.mix import Mix, NetSizes
from qat.analysis.sensitivity.parts import GRANULARITIES, Part, TakenApart, take_apart
from qat.errors import UsageError
from qat.ptq.calibrate import in_float
from qat.utils.validate import check_bits, check_choice, check_number

log = logging.getLogger(__name__)
MEASURES = (ONLY, WITHOUT, BITS)


@dataclass(frozen=True)
class Sensitivity(Analysis):
    """The knobs of `analysis/sensitivity.yaml`.

    Attributes:
        by: what is changed at a time: a `site`, a `module` or a `block`.
        measures: `only` (quantized alone), `without` (alone in float), `bits` (its weights at other widths).
        bits: these widths.
        steps_from: see `WeightChange`; None = `own`, and `mse` for weights that are float.
        budget_mb: sizes to suggest bits for, 10^6 bytes; None = no suggestion.

    Raises:
        UsageError: a value that cannot work.
    """

    by: str = "module"
    measures: Sequence[str] = MEASURES
    bits: Sequence[int] = (2, 3, 4, 8)
    steps_from: str | None = None
    budget_mb: float | Sequence[float] | None = None

    name: ClassVar[str] = "sensitivity"
    split: ClassVar[str | None] = "val"

    def __post_init__(self) -> None:
        check_choice("analysis.by", self.by, GRANULARITIES)
        for name, value in (("measures", self.measures), ("bits", self.bits)):
            if not isinstance(value, list | tuple) or not value:
                raise UsageError(f"analysis.{name}={value!r}: must be a list")
        for measure in self.measures:
            check_choice("analysis.measures", measure, MEASURES)
        for width in self.bits:
            check_bits("analysis.bits", width)
        if self.steps_from is not None:
            check_choice("analysis.steps_from", self.steps_from, STEPS_FROM)
        for budget in self.budgets:
            check_number("analysis.budget_mb", budget, 0, above=True)
        if self.budgets and BITS not in self.measures:
            raise UsageError(f"analysis.measures={list(self.measures)}: a suggestion for analysis.budget_mb is made of measure {BITS}")

    @property
    def budgets(self) -> tuple[float, ...]:
        """All that were asked for."""
        asked: Sequence[Any] = self.budget_mb if isinstance(self.budget_mb, list | tuple) else [self.budget_mb]
        return tuple(budget for budget in asked if budget is not None)

    def points(self, nets: Sequence[StudiedNet], images: ImageSet) -> list[EvaluationPoint]:
        """The net as it is and in float, then each part by each measure."""
        if self.budgets and images.split == "test":
            log.warning(
                "split=test: bits that are chosen on test images make a test accuracy no estimate any more; split=val is for choosing"
            )
        found = []
        for studied in nets:
            apart = self._apart(studied)
            for budget in self.budgets:
                NetSizes(apart, self.bits).check(studied.label, budget)
            part_points = [
                point for measure in self.measures for part in apart.parts for point in self._points_of(studied.label, apart, part, measure)
            ]
            if not part_points:
                raise UsageError(
                    f"analysis.measures={list(self.measures)}: {studied.label} has nothing of the kind; a float net has {BITS}"
                )
            found.append(EvaluationPoint({"net": studied.label, "measure": AS_IS}, apart.net))
            if any(part.sites for part in apart.parts):
                found.append(EvaluationPoint({"net": studied.label, "measure": FLOAT}, apart.net, functools.partial(in_float, apart.net)))
            found += part_points
        return found

    def follow_up(self, nets: Sequence[StudiedNet], images: ImageSet, rows: Sequence[Row]) -> list[EvaluationPoint]:
        """Suggested bits as a whole, and the same bits everywhere."""
        found = []
        findings = SensitivityResults(rows)
        for studied in nets if self.budgets else ():
            apart = self._apart(studied)
            for key, mix in self.mixes(studied.label, apart, findings):
                change = functools.partial(apart.with_bits, mix.bits, self._steps_from(apart))
                found.append(EvaluationPoint({"net": studied.label, **key}, apart.net, change))
        return found

    def outcome(self, nets: Sequence[StudiedNet], rows: Sequence[Row]) -> Outcome:
        """Tables of parts and of suggested bits; bars, a heat map of bits and parts, size against loss."""
        findings = SensitivityResults(rows)
        taken = [(studied.label, self._apart(studied)) for studied in nets]
        mixes = {label: list(self.mixes(label, apart, findings)) for label, apart in taken}
        return sensitivity_outcome(taken, findings, self.bits, mixes)

    def mixes(self, label: str, apart: TakenApart, findings: SensitivityResults) -> Iterator[tuple[dict[str, Any], Mix]]:
        """For each budget the bits of each part, then each width everywhere; nothing as long as a measurement is missing."""
        sizes = NetSizes(apart, self.bits)
        rises = {(part.name, bits): findings.rise(label, part, bits) for part in sizes.parts for bits in sizes.widths[part.name]}
        known = {key: rise for key, rise in rises.items() if rise is not None}
        if not self.budgets or len(known) < len(rises):
            return
        for budget in self.budgets:
            yield {"measure": SUGGESTED, "budget_mb": budget}, sizes.best(budget, known)
        for width in self.bits:
            yield {"measure": UNIFORM, "bits": width}, sizes.uniform(width)

    def _apart(self, studied: StudiedNet) -> TakenApart:
        return take_apart(studied.net, studied.input_size, self.by)

    def _steps_from(self, apart: TakenApart) -> str:
        return self.steps_from or ("mse" if apart.weights.is_float else "own")

    def _points_of(self, label: str, apart: TakenApart, part: Part, measure: str) -> Iterator[EvaluationPoint]:
        key = {"net": label, "measure": measure, "part": part.name}
        if measure == BITS and part.weights:
            for width in self.bits:
                if width != part.bits:
                    change = functools.partial(apart.with_bits, {part.name: width}, self._steps_from(apart))
                    yield EvaluationPoint({**key, "bits": width}, apart.net, change)
        elif measure != BITS and part.sites:
            yield EvaluationPoint(key, apart.net, functools.partial(apart.only if measure == ONLY else apart.without, part))
