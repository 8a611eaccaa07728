"""All claims with their records, and texts that quote numbers from them."""

from __future__ import annotations

import statistics
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.claims.claim import Arm, Claim, load_claims
from evidence.claims.records import Record, read_records
from evidence.pages.numbers import DEFAULT_FORMAT, MIXED, formatted, spread, with_interval
from qat.errors import UsageError

NO_RUNS = "(not run yet)"
# An arm and a metric.
Metric = tuple[str, str]


@dataclass(frozen=True)
class Evidence:
    """All claims, and the records by claim and arm, then by seed.

    Methods accept the name of an arm as claim files write it: `NAME` for an arm of the same claim,
    `CLAIM/NAME` for any other arm. `A|B|C`, arms that differ in the float model they start from,
    counts as one arm whose seeds are 0, 1, 2: the value of each is the mean over the seeds of its
    arm.
    """

    claims: Mapping[str, Claim]
    runs: Mapping[tuple[str, str], Mapping[int, Record]]

    def arm(self, claim: Claim, name: str) -> Arm:
        """Look up an arm.

        Raises:
            UsageError: there is no such arm.
        """
        owner, _, own_name = name.rpartition("/")
        owner = owner or claim.id
        if owner not in self.claims or own_name not in self.claims[owner].arms:
            raise UsageError(
                f"{claim.file}: arm {name!r}: must be an arm of a claim, CLAIM/ARM or ARM"
            )
        return self.claims[owner].arms[own_name]

    def records(self, claim: Claim, name: str) -> list[Record]:
        """Records of an arm, by seed."""
        records: list[Record] = []
        for part in name.split("|"):
            arm = self.arm(claim, part)
            records += self.runs.get((arm.claim, arm.name), {}).values()
        return records

    def of_claim(self, claim: Claim) -> list[Record]:
        """Records of the claim's own arms, in the order of its file."""
        records = []
        for arm in claim.arms:
            records += self.records(claim, arm)
        return records

    def values(self, claim: Claim, arm: str, metric: str) -> dict[int, float]:
        """A metric by seed, for the runs that measured it."""
        if "|" in arm:
            means = {}
            for number, part in enumerate(arm.split("|")):
                part_values = self.values(claim, part, metric)
                if part_values:
                    means[number] = statistics.fmean(part_values.values())
            return means
        values = {}
        for record in self.records(claim, arm):
            value = record.values.get(metric)
            if value is not None:
                values[record.seed] = value
        return values

    def measured(self, claim: Claim, arm: str, metric: str) -> dict[int, float]:
        """A metric by seed.

        Raises:
            UsageError: there are runs, but none has the metric.
        """
        records = self.records(claim, arm)
        if records and not any(metric in record.values for record in records):
            metrics = set().union(*(record.values for record in records))
            raise UsageError(
                f"{claim.file}: {arm}.{metric}: must be one of {', '.join(sorted(metrics))}"
            )
        return self.values(claim, arm, metric)

    def differences(self, claim: Claim, first: Metric, second: Metric | float) -> list[float]:
        """Differences of two arms, seed by seed.

        A number is compared with every seed. A model that other runs start from, and that has only
        seed 0, is also compared with every seed.
        """
        left = self.measured(claim, *first)
        if not isinstance(second, tuple):
            return [value - second for value in left.values()]
        right = self.measured(claim, *second)
        if self._is_start(claim, second[0]) and 0 in right:
            right = dict.fromkeys(left, right[0])
        elif self._is_start(claim, first[0]) and 0 in left:
            left = dict.fromkeys(right, left[0])
        return [left[seed] - right[seed] for seed in left if seed in right]

    def differences_by_image(self, claim: Claim, first: str, second: str) -> list[float]:
        """Difference of two arms for each test image, in percent: the mean over common seeds.

        The list is empty if no seed has results by image for both arms.
        """
        left = {record.seed: record.hits for record in self.records(claim, first)}
        right = {record.seed: record.hits for record in self.records(claim, second)}
        by_seed = []
        for seed in left.keys() & right.keys():
            if left[seed] and right[seed]:
                pairs = zip(left[seed], right[seed], strict=True)
                by_seed.append([100.0 * (hit - other_hit) for hit, other_hit in pairs])
        return [statistics.fmean(differences) for differences in zip(*by_seed, strict=True)]

    def mixes_cpus(self, claim: Claim, first: str, second: str | float) -> bool:
        """True if runs of the two arms with the same seed used different types of CPUs.

        Models that other runs start from do not count.

        Args:
            claim: the claim whose file names the arms.
            first: an arm.
            second: an arm; `mean ARM`, which pairs each run with all of that arm; or a number.
        """
        if not isinstance(second, str):
            return False
        other = second.removeprefix("mean ")
        if "|" in other:
            pairs = zip(first.split("|"), other.split("|"), strict=True)
            return any(self.mixes_cpus(claim, *pair) for pair in pairs)
        if self._is_start(claim, first) or self._is_start(claim, other):
            return False
        if other != second:
            records = self.records(claim, first) + self.records(claim, other)
            return len({record.processor for record in records}) > 1
        left = self._processors(claim, first)
        right = self._processors(claim, other)
        return any(left[seed] != right[seed] for seed in left.keys() & right.keys())

    def _processors(self, claim: Claim, arm: str) -> dict[int, str]:
        return {record.seed: record.processor for record in self.records(claim, arm)}

    def _is_start(self, claim: Claim, name: str) -> bool:
        if "|" in name:
            return False
        arm = self.arm(claim, name)
        return arm.keep and tuple(arm.seeds) == (0,)

    def filled(self, claim: Claim, text: str, words: Mapping[str, str] | None = None) -> str:
        """A claim's text, with its fields replaced by numbers.

        Fields are `{arm.metric}`, `{CLAIM/arm.metric}`, `{arm.metric - other.metric:.1f}` (pairs
        of seeds), `{arm.metric - mean other.metric}`, and `{word}` of `words`. `{...:interval}`
        shows a 95 % interval instead of the deviation, `{...:mean}` neither, `{...:n}` the number
        of seeds, and `{...:images}`, for a difference, an interval of top-1 over test images. `{{`
        becomes a brace. A difference of runs on two types of CPUs has a mark.

        Raises:
            UsageError: a field names an arm or a metric that does not exist.
            ValueError: a field is not a number.
        """
        return _Numbers(self, claim, words or {}).format(text)


@dataclass(frozen=True)
class _Field:
    """Value of a field: one number per seed.

    For a difference, also the two arms, and `sign` = "+" so that a plus sign is printed.
    """

    values: Sequence[float]
    sign: str = ""
    arms: tuple[str, str] = ("", "")


class _Numbers(string.Formatter):
    """`str.format` with fields that are metrics of arms, or differences of two."""

    def __init__(self, evidence: Evidence, claim: Claim, words: Mapping[str, str]) -> None:
        self.evidence = evidence
        self.claim = claim
        self.words = words

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Return the word or the `_Field` of a field name, and the name."""
        if field_name in self.words:
            return self.words[field_name], field_name
        terms = [tuple(term.strip().split(".", 1)) for term in field_name.split(" - ")]
        if len(terms) > 2 or any(len(term) != 2 for term in terms):
            raise ValueError(f"{field_name!r}: must be ARM.METRIC, or a difference of two")
        arm, metric = terms[0]
        if len(terms) == 1:
            values = list(self.evidence.measured(self.claim, arm, metric).values())
            return _Field(values), field_name
        other_arm, other_metric = terms[1]
        other: Metric | float = other_arm, other_metric
        if other_arm.startswith("mean "):
            other_arm = other_arm.removeprefix("mean ")
            measured = self.evidence.measured(self.claim, other_arm, other_metric)
            if not measured:
                return _Field([]), field_name
            other = statistics.mean(measured.values())
        differences = self.evidence.differences(self.claim, (arm, metric), other)
        return _Field(differences, "+", (arm, terms[1][0])), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format a field, with a mark if it mixes types of CPUs; words stay unchanged."""
        if isinstance(value, str):
            return value
        values = value.values
        if format_spec == "images":
            values = self.evidence.differences_by_image(self.claim, *value.arms)
        if not values:
            return NO_RUNS
        if format_spec == "n":
            return str(len(values))
        is_mixed = value.sign and self.evidence.mixes_cpus(self.claim, *value.arms)
        mark = MIXED if is_mixed else ""
        if format_spec == "mean":
            return formatted(statistics.mean(values), value.sign + DEFAULT_FORMAT) + mark
        if format_spec in {"interval", "images"}:
            return with_interval(values, value.sign + DEFAULT_FORMAT) + mark
        spec = value.sign + (format_spec or DEFAULT_FORMAT).removeprefix("+")
        return spread(values, spec) + mark


def read_evidence(claims_dir: Path, records_dir: Path) -> Evidence:
    """Read claim files and records.

    Raises:
        UsageError: a file is not valid, or no claim file contains the claim or arm of a record.
    """
    claims = load_claims(claims_dir)
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in read_records(records_dir):
        if record.claim not in claims or record.arm not in claims[record.claim].arms:
            raise UsageError(
                f"{records_dir}: {record.claim}/{record.arm} "
                f"must be an arm of a claim in {claims_dir}"
            )
        runs.setdefault((record.claim, record.arm), {})[record.seed] = record
    return Evidence(claims, runs)
