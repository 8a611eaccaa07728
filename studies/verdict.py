"""From paired differences to a verdict: how sure three seeds can be of what a claim says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from studies.claims import Claim, Expectation
from studies.evidence import Evidence

SUPPORTED, CONTRADICTED, UNDECIDED, OPEN = "supported", "contradicted", "undecided", "open"
CONFIRMED, NOT_CONFIRMED, MIXED, NOT_DECIDED = "confirmed", "not confirmed", "mixed", "not decided yet"
SEEDS = 3
ERRORS = 2.0
# Shares of images are decimals, which floats only come near to: a margin that is met exactly must come out as zero.
_DIGITS = 12


@dataclass(frozen=True)
class Judged:
    """An expectation, the differences arm - than of all pairs of seeds, and what they say."""

    expectation: Expectation
    differences: tuple[float, ...]
    state: str


def leads(expectation: Expectation, pairs: Sequence[tuple[float, float]]) -> list[float]:
    """By how much every pair is beyond its margin in the expected direction; negative where it falls short."""
    return [round(_lead(expectation.direction, value, other, expectation.margin), _DIGITS) for value, other in pairs]


def _lead(direction: str, value: float, other: float, margin: float) -> float:
    if direction == "higher":
        return value - other - margin
    if direction == "lower":
        return other - value - margin
    return value - other + margin if direction == "within" else margin - abs(value - other)


def state(found: Sequence[float]) -> str:
    """Supported: all beyond zero, and their mean by more than two standard errors; contradicted: likewise below; open: too few seeds."""
    if len(found) < SEEDS:
        return OPEN
    mean, error = statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))
    if min(found) > 0 and mean > ERRORS * error:
        return SUPPORTED
    return CONTRADICTED if max(found) < 0 and -mean > ERRORS * error else UNDECIDED


def judge(claim: Claim, evidence: Evidence) -> list[Judged]:
    """All expectations of a claim.

    Raises:
        UsageError: there are runs, but none has the metric.
    """
    judged = []
    for number, one in enumerate(claim.expect):
        for arm in (one.arm, one.than):
            if isinstance(arm, str):
                evidence.check_metric(claim, f"expect[{number}].metric", arm, one.metric)
        than = (one.than, one.metric) if isinstance(one.than, str) else float(one.than)
        pairs = evidence.pairs(claim, (one.arm, one.metric), than)
        judged.append(Judged(one, tuple(value - other for value, other in pairs), state(leads(one, pairs))))
    return judged


def verdict(judged: Sequence[Judged]) -> str:
    """Of a claim with these expectations; empty where it has none."""
    states = [one.state for one in judged]
    if not states:
        return ""
    if OPEN in states:
        return NOT_DECIDED
    if SUPPORTED not in states:
        return NOT_CONFIRMED
    return CONFIRMED if set(states) == {SUPPORTED} else MIXED


def summary(judged: Sequence[Judged]) -> str:
    """One sentence: how many are supported, and which are not."""
    count = sum(one.state == SUPPORTED for one in judged)
    others = [
        f"{name}: {'; '.join(found)}"
        for name in (CONTRADICTED, UNDECIDED, OPEN)
        if (found := [one.expectation.what for one in judged if one.state == name])
    ]
    noun = "expectation" if len(judged) == 1 else "expectations"
    return f"{count} of {len(judged)} {noun} supported{''.join(f'. {text.capitalize()[:1]}{text[1:]}' for text in others)}."
