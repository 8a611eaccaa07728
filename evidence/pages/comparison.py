"""Expectations of claims compared with the measured differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evidence.claims.claim import Claim, Expectation
from evidence.claims.intervals import interval
from evidence.pages.evidence import Evidence
from evidence.pages.numbers import MIXED, SEEDS, with_interval

CONFIRMED = "confirmed"
CONTRADICTED = "contradicted"
INCONCLUSIVE = "inconclusive"
TOO_FEW = "fewer than 3 seeds"
VERDICTS = (CONFIRMED, CONTRADICTED, INCONCLUSIVE, TOO_FEW)


@dataclass(frozen=True)
class Comparison:
    """An expectation and the differences of all pairs of seeds.

    Attributes:
        expectation: the expected difference.
        differences: difference `arm` - `than` for each seed.
        mixed: True if some pairs ran on two types of CPUs.
    """

    expectation: Expectation
    differences: tuple[float, ...]
    mixed: bool = False

    @property
    def verdict(self) -> str:
        """Confirmed if the whole interval is in the expected range, contradicted if none of it is.

        Otherwise inconclusive; `TOO_FEW` for fewer than 3 seeds.
        """
        ends = interval(self.differences)
        if ends is None or len(self.differences) < SEEDS:
            return TOO_FEW
        margin = self.expectation.margin
        ranges = {
            "higher": (margin, math.inf),
            "lower": (-math.inf, -margin),
            "within": (-margin, math.inf),
            "near": (-margin, margin),
        }
        low, high = ranges[self.expectation.direction]
        if low < ends[0] and ends[1] < high:
            return CONFIRMED
        if ends[1] < low or ends[0] > high:
            return CONTRADICTED
        return INCONCLUSIVE

    @property
    def difference(self) -> str:
        """Mean and interval, as text."""
        return with_interval(self.differences, f"+{self.expectation.format.removeprefix('+')}")

    @property
    def seeds(self) -> str:
        """Number of pairs as text, with a mark if they mix types of CPUs."""
        return f"{len(self.differences)}{MIXED * self.mixed}"

    @property
    def expected(self) -> str:
        """The expected difference in words."""
        margin = f"{self.expectation.margin:g}"
        negative = f"-{margin}" if self.expectation.margin > 0 else margin
        texts = {
            "near": f"within ±{margin}",
            "higher": f"above {margin}",
            "lower": f"below {negative}",
            "within": f"above {negative}",
        }
        return texts[self.expectation.direction]


def compare(claim: Claim, evidence: Evidence) -> list[Comparison]:
    """Compare all expectations of a claim; the first is the primary one.

    Raises:
        UsageError: there are runs, but none has the metric.
    """
    comparisons = []
    for entry in claim.expect:
        other: tuple[str, str] | float
        if isinstance(entry.than, str):
            other = entry.than, entry.metric
        else:
            other = float(entry.than)
        differences = evidence.differences(claim, (entry.arm, entry.metric), other)
        is_mixed = evidence.mixes_cpus(claim, entry.arm, entry.than)
        comparisons.append(Comparison(entry, tuple(differences), is_mixed))
    return comparisons


def judged(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The primary comparison of a claim, then the others that have a verdict."""
    others = [comparison for comparison in comparisons[1:] if comparison.expectation.judged]
    return [*comparisons[:1], *others]
