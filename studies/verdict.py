"""From paired differences to yes, no or too small to see. `introduction.md` has the rule in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from studies.claims import Claim, Expectation
from studies.evidence import Evidence

YES, NO, SMALL, OPEN = "yes", "no", "too small to see", "not decided yet"
SEEDS = 3
LEVEL = 0.95
# Shares of images are decimals, which floats only come near to: a margin that is met exactly must come out as equal.
_DIGITS = 12


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean of paired differences, 95 %, by Student's t (a paired t-test at 5 %); None of fewer than two."""
    if len(differences) < 2:
        return None
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    reach = error * float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1))
    return round(mean - reach, _DIGITS), round(mean + reach, _DIGITS)


def wanted(one: Expectation) -> tuple[float, float]:
    """Between which ends the difference should lie."""
    return {
        "higher": (one.margin, math.inf),
        "lower": (-math.inf, -one.margin),
        "within": (-one.margin, math.inf),
        "near": (-one.margin, one.margin),
    }[one.direction]


@dataclass(frozen=True)
class Found:
    """An expectation, and the differences arm - than of all pairs of seeds."""

    expectation: Expectation
    differences: tuple[float, ...]

    @property
    def answer(self) -> str:
        """Whether the difference is where it should be: yes and no where all of the interval says so."""
        around = interval(self.differences)
        if around is None or len(self.differences) < SEEDS:
            return OPEN
        low, high = wanted(self.expectation)
        if low < around[0] and around[1] < high:
            return YES
        return NO if around[1] < low or around[0] > high else SMALL

    @property
    def is_reached(self) -> bool:
        """True if the mean is where it should be, or at the end of that."""
        low, high = wanted(self.expectation)
        return bool(self.differences) and low <= round(statistics.mean(self.differences), _DIGITS) <= high


def find(claim: Claim, evidence: Evidence) -> list[Found]:
    """All expectations of a claim; the first is its primary one.

    Raises:
        UsageError: there are runs, but none has the metric.
    """
    found = []
    for one in claim.expect:
        than = (one.than, one.metric) if isinstance(one.than, str) else float(one.than)
        found.append(Found(one, tuple(value - other for value, other in evidence.pairs(claim, (one.arm, one.metric), than))))
    return found
