"""`docs/accuracy.md`, `evidence/pages/CLAIM.md` and the results in the README, made of claims and records alone."""

from __future__ import annotations

import math
import re
import statistics
import string
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.claims.claim import Arm, Claim, Expectation, Table, load_claim, load_claims
from evidence.claims.intervals import interval
from evidence.claims.records import Record, read_records
from evidence.pages import drawing
from evidence.speed.timing import table as markdown
from qat.errors import UsageError
from qat.utils.files import write_text

CLAIMS, RECORDS, OVERVIEW = "evidence/claims", "evidence/records", "evidence/pages/accuracy.yaml"
PAGES, PAGE, FIGURES, README = "evidence/pages", "docs/accuracy.md", "docs/figures", "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MAKE = "python -m evidence page"
DEFAULT, NONE, MISSING = ".2f", "–", "(not run yet)"
YES, NO, SMALL, OPEN = "confirmed", "contradicted", "inconclusive", "fewer than 3 seeds"
SEEDS = 3
# Marks pairs of which one ran on another type of CPU.
MIXED = "\\*"
MIXED_NOTE = f"{MIXED} Some pairs ran on two CPU types, which changes a top-1 by up to 0.2 points."
# Links in a claim's text, relative to docs/.
_RELATIVE = re.compile(r"\]\((?!#|https?:)([^)\s]+)")


def shown(value: float, spec: str = DEFAULT) -> str:
    """One number; what rounds to zero has no sign but a demanded one."""
    sign, rest = ("+", spec[1:]) if spec.startswith("+") else ("", spec)
    return format(value, f"{sign}z{rest}")


def spread(values: Collection[float], spec: str = DEFAULT) -> str:
    """Mean ± sample deviation; the number alone where there is one, or one count for all; a dash where there is none."""
    if not values:
        return NONE
    mean, around = (
        shown(statistics.mean(values), spec),
        statistics.stdev(values) if len(values) > 1 else None,
    )
    return (
        mean
        if around is None or (around == 0 and spec.endswith(".0f"))
        else f"{mean} ± {shown(around, spec.removeprefix('+'))}"
    )


@dataclass(frozen=True)
class Evidence:
    """All claims, and the records by claim and arm, by seed; arms are named as the claim that asks for them names them."""

    claims: Mapping[str, Claim]
    runs: Mapping[tuple[str, str], Mapping[int, Record]]

    def arm(self, claim: Claim, name: str) -> Arm:
        """An arm, `NAME` of the claim or `CLAIM/NAME`.

        Raises:
            UsageError: there is none of that name.
        """
        owner, _, own = name.rpartition("/")
        owner = owner or claim.id
        if owner not in self.claims or own not in self.claims[owner].arms:
            raise UsageError(
                f"{claim.file}: arm {name!r}: must be one of a claim's, CLAIM/ARM or ARM"
            )
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

    def differences(
        self, claim: Claim, one: tuple[str, str], other: tuple[str, str] | float
    ) -> list[float]:
        """Differences of two arms, each with its metric, of the same seeds.

        A number, and a net that others start from and that has seed 0 alone, stand beside every seed of the other.
        """
        left = self.measured(claim, *one)
        if not isinstance(other, tuple):
            return [value - other for value in left.values()]
        right = self.measured(claim, *other)
        if self._is_start(claim, other[0]) and 0 in right:
            right = dict.fromkeys(left, right[0])
        elif self._is_start(claim, one[0]) and 0 in left:
            left = dict.fromkeys(right, left[0])
        return [left[seed] - right[seed] for seed in left if seed in right]

    def mixes_cpus(self, claim: Claim, one: str, other: str | float) -> bool:
        """Whether runs of the same seed of two arms ran on CPUs of different types; models that others start from do not count."""
        if not isinstance(other, str) or any(self._is_start(claim, arm) for arm in (one, other)):
            return False
        left, right = (
            {record.seed: record.processor for record in self.records(claim, arm)}
            for arm in (one, other)
        )
        return any(left[seed] != right[seed] for seed in left.keys() & right.keys())

    def _is_start(self, claim: Claim, name: str) -> bool:
        arm = self.arm(claim, name)
        return arm.keep and tuple(arm.seeds) == (0,)

    def filled(self, claim: Claim, text: str, words: Mapping[str, str] | None = None) -> str:
        """A claim's text with its numbers.

        `{arm.metric}`, `{arm.metric - other.metric:.1f}` of pairs of seeds, `{arm.metric - mean other.metric}`, `{CLAIM/arm.metric}`;
        `{...:interval}` shows a 95 % interval in place of the deviation, `{...:n}` how many seeds; `{word}` is one of `words`;
        `{{` is a brace.

        Raises:
            UsageError: one of them names an arm or a metric that does not exist.
            ValueError: it is no number.
        """
        return _Numbers(self, claim, words or {}).format(text)


class _Numbers(string.Formatter):
    """`str.format` whose fields are metrics of arms and differences of two; a number that no run has given yet says so."""

    def __init__(self, evidence: Evidence, claim: Claim, words: Mapping[str, str]) -> None:
        self.evidence, self.claim, self.words = evidence, claim, words

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        """A word, or values and the sign that they are shown with."""
        if field_name in self.words:
            return self.words[field_name], field_name
        one, *others = [tuple(part.strip().split(".", 1)) for part in field_name.split(" - ")]
        if len(others) > 1 or any(len(part) != 2 for part in (one, *others)):
            raise ValueError(f"{field_name!r} is no number")
        if not others:
            return (list(self.evidence.measured(self.claim, *one).values()), ""), field_name
        arm, metric = others[0]  # type: ignore[misc]
        if arm.startswith("mean "):
            than: Any = statistics.mean(
                self.evidence.measured(self.claim, arm.removeprefix("mean "), metric).values()
            )
        else:
            than = arm, metric
        return (self.evidence.differences(self.claim, one, than), "+"), field_name  # type: ignore[arg-type]

    def format_field(self, value: Any, format_spec: str) -> str:
        """A word as it is; mean ± deviation, mean and `interval`, or the number of values (`n`)."""
        if isinstance(value, str):
            return value
        values, sign = value
        if not values:
            return MISSING
        if format_spec == "n":
            return str(len(values))
        if format_spec == "interval":
            return with_interval(values, sign + DEFAULT)
        return spread(values, sign + (format_spec or DEFAULT).removeprefix("+"))


def read_evidence(claims_dir: Path, records_dir: Path) -> Evidence:
    """Claim files and records.

    Raises:
        UsageError: one of them is not as it should be, or a record has a claim or an arm that is in no file.
    """
    claims = load_claims(claims_dir)
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in read_records(records_dir):
        if record.claim not in claims or record.arm not in claims[record.claim].arms:
            raise UsageError(
                f"{records_dir}: {record.claim}/{record.arm} must be an arm of a claim in {claims_dir}"
            )
        runs.setdefault((record.claim, record.arm), {})[record.seed] = record
    return Evidence(claims, runs)


def with_interval(values: Sequence[float], spec: str = DEFAULT) -> str:
    """Mean and interval, or the mean alone below 3 values; a dash where there is none."""
    if not values:
        return NONE
    mean, around = shown(statistics.mean(values), spec), interval(values)
    return (
        mean
        if around is None or len(values) < SEEDS
        else f"{mean} [{', '.join(shown(end, spec) for end in around)}]"
    )


@dataclass(frozen=True)
class Found:
    """An expectation, the differences arm - than of all pairs of seeds, and whether some of these mix types of CPUs."""

    expectation: Expectation
    differences: tuple[float, ...]
    mixed: bool = False

    @property
    def answer(self) -> str:
        """Whether the difference is where it should be: yes and no where all of the interval says so."""
        around, margin = interval(self.differences), self.expectation.margin
        if around is None or len(self.differences) < SEEDS:
            return OPEN
        ends = {
            "higher": (margin, math.inf),
            "lower": (-math.inf, -margin),
            "within": (-margin, math.inf),
            "near": (-margin, margin),
        }
        low, high = ends[self.expectation.direction]
        if low < around[0] and around[1] < high:
            return YES
        return NO if around[1] < low or around[0] > high else SMALL

    @property
    def difference(self) -> str:
        """Mean and interval."""
        return with_interval(self.differences, f"+{self.expectation.format.removeprefix('+')}")

    @property
    def seeds(self) -> str:
        """How many pairs, marked where they mix types of CPUs."""
        return f"{len(self.differences)}{MIXED * self.mixed}"

    @property
    def wanted(self) -> str:
        """Where the difference should be."""
        margin, below = (
            f"{self.expectation.margin:g}",
            f"{'-' * (self.expectation.margin > 0)}{self.expectation.margin:g}",
        )
        texts = {
            "near": f"within ±{margin}",
            "higher": f"above {margin}",
            "lower": f"below {below}",
            "within": f"above {below}",
        }
        return texts[self.expectation.direction]


def find(claim: Claim, evidence: Evidence) -> list[Found]:
    """All expectations of a claim; the first is its primary one.

    Raises:
        UsageError: there are runs, but none has the metric.
    """
    found = []
    for one in claim.expect:
        than = (one.than, one.metric) if isinstance(one.than, str) else float(one.than)
        differences = evidence.differences(claim, (one.arm, one.metric), than)
        found.append(Found(one, tuple(differences), evidence.mixes_cpus(claim, one.arm, one.than)))
    return found


def pages(evidence: Evidence) -> dict[str, str]:
    """The pages of claims, by name.

    Raises:
        UsageError: one line that says which file is not as it should be.
    """
    return {
        f"{PAGES}/{claim.id}.md": section(claim, evidence) for claim in evidence.claims.values()
    }


def overview(evidence: Evidence, claim: Claim) -> str:
    """`docs/accuracy.md`: the text of `evidence/pages/accuracy.yaml` with its numbers and the verdicts of all claims."""
    judged = [
        one for one in evidence.claims.values() if one.expect and find(one, evidence)[0].differences
    ]
    papers, own = (
        [one for one in judged if one.source.startswith("ours") == is_ours]
        for is_ours in (False, True)
    )
    answers = [find(one, evidence)[0].answer for one in papers]
    counts = ", ".join(
        f"{answers.count(word)} {word}" for word in (YES, NO, SMALL, OPEN) if word in answers
    )
    words = {"counts": counts, "papers": verdicts(papers, evidence), "own": verdicts(own, evidence)}
    return evidence.filled(claim, claim.why, words) + "\n"


def verdicts(claims: Sequence[Claim], evidence: Evidence) -> str:
    """A table: of each claim its primary expectation."""
    rows, mixed = [], False
    for claim in claims:
        one = find(claim, evidence)[0]
        mixed |= one.mixed
        notes = [f"{len(one.differences)} seeds"] * (len(one.differences) != SEEDS) + [
            f"expected {one.wanted}"
        ] * (one.wanted != "above 0")
        what = f"{one.expectation.what} ({'; '.join(notes)})" if notes else one.expectation.what
        rows.append([claim.id, what, f"{one.difference}{MIXED * one.mixed}", one.answer])
    table = markdown(["claim", "compared", "difference", "verdict"], rows)
    return f"{table}\n\n{MIXED_NOTE}" if mixed else table


def section(claim: Claim, evidence: Evidence) -> str:
    """The page of one claim: what is said, what follows, what was measured, and what runs it again."""
    found, own = find(claim, evidence), evidence.of_claim(claim)
    source = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", claim.source)
    parts = [
        f"# {claim.id}: {claim.title}",
        f"Source: {source}.",
        f"> {claim.statement}".replace("\n", "\n> "),
    ]
    parts = [_RELATIVE.sub(r"](../../docs/\1", part) for part in parts]
    for primary in found[:1]:
        seeds = f"{primary.seeds} seed{'s' * (len(primary.differences) != 1)}"
        difference = f"{primary.difference} over {seeds}; " if primary.differences else ""
        parts.append(
            f"**{claim.id}: {primary.answer}.** {primary.expectation.what}: {difference}expected {primary.wanted}."
        )
    parts += [
        _RELATIVE.sub(r"](../../docs/\1", evidence.filled(claim, claim.why)),
        *_shown(claim, evidence, found[1:]),
    ]
    if own:
        made = f"`python -m evidence run {claim.id}` makes these runs ({spent(own)})"
        parts.append(f"{made}; records: [{RECORDS}/{claim.id}.jsonl](../records/{claim.id}.jsonl).")
    else:
        parts.append("No runs of its own.")
    retired: dict[str, list[str]] = defaultdict(list)
    for arm in claim.arms.values():
        if arm.retired:
            retired[arm.retired].append(f"`{arm.name}`")
    for why, names in retired.items():
        parts.append(
            f"Made by an older version, whose commit their records name: {', '.join(names)} ({why})."
        )
    parts.append(MIXED_NOTE if any(one.mixed for one in found) else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(claim: Claim, evidence: Evidence, beside: Sequence[Found]) -> Iterator[str]:
    """Tables, differences, pictures."""
    for table in claim.tables:
        yield table.caption
        yield results(claim, table, evidence)
    if beside:
        yield "Further differences, not judged:"
        rows = [[one.expectation.what, one.difference, one.wanted, one.seeds] for one in beside]
        yield markdown(["", "difference", "expected", "seeds"], rows)
    for figure in claim.figures:
        found = drawing.gather(claim, figure, evidence)
        if found.series:
            yield f"![{drawing.alt(figure, found)}](figures/{figure.file})"
            yield figure.caption and f"*{figure.caption}*"


def spent(records: list[Record]) -> str:
    """How many runs, and their time."""
    seconds = math.fsum(record.wall_seconds or 0.0 for record in records)
    time = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return f"{len(records)} run{'s' * (len(records) != 1)}, {time} in all"


def results(claim: Claim, table: Table, evidence: Evidence) -> str:
    """Mean ± deviation over seeds; a dash where there is no run."""
    rows = []
    for arm in table.rows:
        cells = [
            spread(evidence.values(claim, arm, metric).values(), table.formats.get(metric, DEFAULT))
            for metric in table.columns
        ]
        rows.append([
            table.labels.get(arm) or evidence.arm(claim, arm).label,
            *cells,
            str(len(evidence.records(claim, arm))),
        ])
    return markdown(["", *table.columns.values(), "seeds"], rows)


def made(root: Path, evidence: Evidence) -> dict[str, str]:
    """The files that are made, by name below the root of the repository.

    Raises:
        UsageError: claims or records are not as they should be.
    """
    text, claim = (root / README).read_bytes().decode(), load_claim(root / OVERVIEW)
    (before, rest) = text.split(BEGIN)
    after = rest.split(END)[1]
    block = f"{BEGIN}\n\n{evidence.filled(claim, claim.readme)}\n\n{END}"
    return pages(evidence) | {PAGE: overview(evidence, claim), README: before + block + after}


def write(root: Path) -> None:
    """Write pages, figures and the part of the README below the root of the repository, each whole or not at all; of a mistake nothing."""
    evidence = read_evidence(root / CLAIMS, root / RECORDS)
    files = made(root, evidence)
    folders = [(claim, root / PAGES / "figures") for claim in evidence.claims.values()] + [
        (load_claim(root / OVERVIEW), root / FIGURES)
    ]
    for claim, folder in folders:
        for figure in claim.figures:
            found = drawing.gather(claim, figure, evidence)
            if found.series:
                drawing.write(figure, found, folder)
    for name, text in files.items():
        write_text(root / name, text)


def check(root: Path) -> list[str]:
    """What is not as claims and records say: a line each, nothing where all is up to date. Pictures are not looked at."""
    evidence, stale = read_evidence(root / CLAIMS, root / RECORDS), []
    for name, wanted in made(root, evidence).items():
        if not (root / name).is_file() or (root / name).read_bytes() != wanted.encode():
            stale.append(f"{root / name}: not what {RECORDS}/ says, {MAKE} writes it")
    return stale
