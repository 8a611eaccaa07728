"""From paired differences to a verdict: how sure three seeds can be of what a claim says. `introduction.md` has the rule in words."""

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
    return [round(_lead(expectation.direction, value - other, expectation.margin), _DIGITS) for value, other in pairs]


def _lead(direction: str, difference: float, margin: float) -> float:
    if direction == "near":
        return margin - abs(difference)
    if direction == "within":
        return difference + margin
    return (difference if direction == "higher" else -difference) - margin


def state(found: Sequence[float]) -> str:
    """Supported: all above zero, and their mean by more than two standard errors; contradicted: all below; open: too few seeds."""
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
    for one in claim.expect:
        than = (one.than, one.metric) if isinstance(one.than, str) else float(one.than)
        pairs = evidence.pairs(claim, (one.arm, one.metric), than)
        judged.append(Judged(one, tuple(value - other for value, other in pairs), state(leads(one, pairs))))
    return judged


def verdict(judged: Sequence[Judged]) -> str:
    """Of a claim with these expectations; empty where it has none."""
    states = {one.state for one in judged}
    if not states:
        return ""
    if OPEN in states:
        return NOT_DECIDED
    if SUPPORTED not in states:
        return NOT_CONFIRMED
    return CONFIRMED if states == {SUPPORTED} else MIXED


def summary(judged: Sequence[Judged]) -> str:
    """One sentence: how many are supported, and which are not."""
    names = {state: [one.expectation.what for one in judged if one.state == state] for state in (SUPPORTED, CONTRADICTED, UNDECIDED, OPEN)}
    count = len(names.pop(SUPPORTED))
    others = "".join(f". {state.capitalize()}: {'; '.join(found)}" for state, found in names.items() if found)
    return f"{count} of {len(judged)} expectation{'s' * (len(judged) != 1)} supported{others}."
