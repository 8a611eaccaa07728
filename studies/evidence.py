"""Claims and the records of their runs together: values by seed, pairs of two arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from studies.checks import wrong
from studies.claims import Claim, load_claims
from studies.records import Record, read_records


@dataclass(frozen=True)
class Evidence:
    """All claims, and the records by claim and arm, by seed; arms are named as the claim that asks for them names them."""

    claims: Mapping[str, Claim]
    runs: Mapping[tuple[str, str], Mapping[int, Record]]

    def label(self, claim: Claim, arm: str) -> str:
        """What an arm is called on the page."""
        owner, name = claim.place(arm)
        return str(self.claims[owner].arms[name]["label"])

    def records(self, claim: Claim, arm: str) -> list[Record]:
        """Of an arm, by seed."""
        return list(self.runs.get(claim.place(arm), {}).values())

    def of_claim(self, claim: Claim) -> list[Record]:
        """Of all its own arms, in the order of its file."""
        return [record for arm in claim.arms for record in self.records(claim, arm)]

    def values(self, claim: Claim, arm: str, metric: str) -> dict[int, float]:
        """A metric by seed, of the runs that have measured it."""
        found = ((record.seed, record.metrics.get(metric)) for record in self.records(claim, arm))
        return {seed: value for seed, value in found if value is not None}

    def pairs(self, claim: Claim, one: tuple[str, str], other: tuple[str, str] | float) -> list[tuple[float, float]]:
        """Values of two arms, each with its metric, of the same seeds.

        A number, and a net that others start from and that has seed 0 alone, stand beside every seed of the other.
        """
        left = self.values(claim, *one)
        if not isinstance(other, tuple):
            return [(value, other) for value in left.values()]
        right = self.values(claim, *other)
        if self._is_start(claim, other[0]) and 0 in right:
            right = dict.fromkeys(left, right[0])
        elif self._is_start(claim, one[0]) and 0 in left:
            left = dict.fromkeys(right, left[0])
        return [(left[seed], right[seed]) for seed in left if seed in right]

    def _is_start(self, claim: Claim, arm: str) -> bool:
        """True of a net whose weights are kept for others; any other single run shares its seed with one run of theirs."""
        owner, name = claim.place(arm)
        found = self.claims[owner]
        return bool(found.arms[name].get("keep")) and found.seeds_of(name) == (0,)

    def is_unknown(self, claim: Claim, arm: str, metric: str) -> bool:
        """Whether there are runs of an arm, and none knows the metric."""
        records = self.records(claim, arm)
        return bool(records) and not any(metric in record.metrics for record in records)

    def check_metric(self, claim: Claim, key: str, arm: str, metric: str) -> None:
        """Raise `UsageError` where a metric is named that no run of an arm has."""
        if self.is_unknown(claim, arm, metric):
            known = sorted({name for record in self.records(claim, arm) for name in record.metrics})
            raise wrong(claim.file, key, f"{arm}.{metric}", f"no such metric, allowed are {', '.join(known)}")


def read_evidence(claims_dir: Path, results_dir: Path) -> Evidence:
    """Claim files and records.

    Raises:
        UsageError: one of them is not as it should be, or a record has a claim or an arm that is in no file.
    """
    claims = load_claims(claims_dir)
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in read_records(results_dir):
        if record.claim not in claims:
            raise wrong(results_dir / record.place, "claim", record.claim, f"no such claim, allowed are {', '.join(claims)}")
        claim = claims[record.claim]
        if record.arm not in claim.arms:
            raise wrong(results_dir / record.place, "arm", record.arm, f"no such arm in {claim.file}, allowed are {', '.join(claim.arms)}")
        runs.setdefault((record.claim, record.arm), {})[record.seed] = record
    return Evidence(claims, runs)
