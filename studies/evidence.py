"""Claims and the records of their runs together: values by seed, pairs of two arms, numbers in text."""

from __future__ import annotations

import statistics
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import UsageError
from studies.claims import Arm, Claim, load_claims
from studies.records import Record, read_records

DEFAULT = ".2f"
NONE, MISSING = "–", "(not run yet)"


def deviation(values: Collection[float]) -> float | None:
    """Sample standard deviation, None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def shown(value: float, spec: str = DEFAULT) -> str:
    """One number; what rounds to zero has no sign but a demanded one."""
    sign, rest = ("+", spec[1:]) if spec.startswith("+") else ("", spec)
    return format(value, f"{sign}z{rest}")


def spread(values: Collection[float], spec: str = DEFAULT) -> str:
    """Mean ± sample deviation; the number alone where there is one, or one count for all; a dash where there is none."""
    if not values:
        return NONE
    mean, around = shown(statistics.mean(values), spec), deviation(values)
    return mean if around is None or (around == 0 and spec.endswith(".0f")) else f"{mean} ± {shown(around, spec.removeprefix('+'))}"


@dataclass(frozen=True)
class Evidence:
    """All claims, and the records by claim and arm, by seed; arms are named as the claim that asks for them names them."""

    claims: Mapping[str, Claim]
    runs: Mapping[tuple[str, str], Mapping[int, Record]]

    def arm(self, claim: Claim, name: str) -> Arm:
        """An arm.

        Raises:
            UsageError: there is none of that name.
        """
        owner, own = claim.place(name)
        if owner not in self.claims or own not in self.claims[owner].arms:
            raise UsageError(f"{claim.file}: arm {name!r}: must be one of a claim's, CLAIM/ARM or ARM")
        return self.claims[owner].arms[own]

    def records(self, claim: Claim, arm: str) -> list[Record]:
        """Of an arm, by seed."""
        found = self.arm(claim, arm)
        return list(self.runs.get((found.claim, found.name), {}).values())

    def of_claim(self, claim: Claim) -> list[Record]:
        """Of all its own arms, in the order of its file."""
        return [record for arm in claim.arms for record in self.records(claim, arm)]

    def values(self, claim: Claim, arm: str, metric: str) -> dict[int, float]:
        """A metric by seed, of the runs that have measured it."""
        found = ((record.seed, record.values.get(metric)) for record in self.records(claim, arm))
        return {seed: value for seed, value in found if value is not None}

    def measured(self, claim: Claim, arm: str, metric: str) -> dict[int, float]:
        """A metric by seed.

        Raises:
            UsageError: there are runs, and none knows the metric.
        """
        records = self.records(claim, arm)
        if records and not any(metric in record.values for record in records):
            known = sorted({name for record in records for name in record.values})
            raise UsageError(f"{claim.file}: {arm}.{metric}: must be one of {', '.join(known)}")
        return self.values(claim, arm, metric)

    def pairs(self, claim: Claim, one: tuple[str, str], other: tuple[str, str] | float) -> list[tuple[float, float]]:
        """Values of two arms, each with its metric, of the same seeds.

        A number, and a net that others start from and that has seed 0 alone, stand beside every seed of the other.
        """
        left = self.measured(claim, *one)
        if not isinstance(other, tuple):
            return [(value, other) for value in left.values()]
        right = self.measured(claim, *other)
        if self._is_start(claim, other[0]) and 0 in right:
            right = dict.fromkeys(left, right[0])
        elif self._is_start(claim, one[0]) and 0 in left:
            left = dict.fromkeys(right, left[0])
        return [(left[seed], right[seed]) for seed in left if seed in right]

    def _is_start(self, claim: Claim, name: str) -> bool:
        """True of a net whose weights are kept for others; any other single run shares its seed with one run of theirs."""
        arm = self.arm(claim, name)
        return arm.keep and tuple(arm.seeds) == (0,)

    def filled(self, claim: Claim, text: str) -> str:
        """A claim's text with its numbers: `{arm.metric}`, `{arm.metric - other.metric:.1f}`, `{CLAIM/arm.metric}`; `{{` is a brace.

        Raises:
            UsageError: one of them names an arm or a metric that does not exist.
        """
        try:
            return _Numbers(self, claim).format(text)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{claim.file}: {error}; must be text with {{arm.metric}}, {{arm.metric - other.metric:.1f}}") from error


class _Numbers(string.Formatter):
    """`str.format` whose fields are metrics of arms and differences of two; a number that no run has given yet says so."""

    def __init__(self, evidence: Evidence, claim: Claim) -> None:
        self.evidence, self.claim = evidence, claim

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[tuple[list[float], str], str]:
        """Values, and the sign that they are shown with."""
        one, *others = [tuple(part.strip().split(".", 1)) for part in field_name.split(" - ")]
        if len(others) > 1 or any(len(part) != 2 for part in (one, *others)):
            raise ValueError(f"{field_name!r} is no number")
        if not others:
            return (list(self.evidence.measured(self.claim, *one).values()), ""), field_name
        return ([left - right for left, right in self.evidence.pairs(self.claim, one, others[0])], "+"), field_name

    def format_field(self, value: tuple[list[float], str], format_spec: str) -> str:
        """Mean ± deviation."""
        values, sign = value
        return spread(values, sign + (format_spec or DEFAULT).removeprefix("+")) if values else MISSING


def read_evidence(claims_dir: Path, results_dir: Path) -> Evidence:
    """Claim files and records.

    Raises:
        UsageError: one of them is not as it should be, or a record has a claim or an arm that is in no file.
    """
    claims = load_claims(claims_dir)
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in read_records(results_dir):
        if record.claim not in claims or record.arm not in claims[record.claim].arms:
            raise UsageError(f"{results_dir / record.place}: {record.claim}/{record.arm} must be an arm of a claim in {claims_dir}")
        runs.setdefault((record.claim, record.arm), {})[record.seed] = record
    return Evidence(claims, runs)
