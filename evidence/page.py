"""`docs/results.md`, `docs/results/CLAIM.md` and the results in the README, made of claims and records alone: the same bytes wherever."""

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

from scipy import stats

from evidence import drawing
from evidence.claims import Arm, Claim, Expectation, Table, load_claims
from evidence.records import Record, read_records
from evidence.timing import table as markdown
from qat.errors import UsageError
from qat.utils.files import write_text

CLAIMS, RECORDS, FIGURES, PAGE, README = "evidence/claims", "evidence/records", "docs/figures", "docs/results.md", "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULTS = "results"  # folder below docs/
HEADLINE = "AIM"
MAKE = "python -m evidence page"
DEFAULT, NONE, MISSING = ".2f", "–", "(not run yet)"
YES, NO, SMALL, OPEN = "yes", "no", "too small to see", "not decided yet"
SEEDS, LEVEL = 3, 0.95
# Shares of images are decimals, which floats only come near to: a margin that is met exactly must come out as equal.
_DIGITS = 12
# Links to a claim, and those that are relative to docs/.
_ANCHOR, _RELATIVE = re.compile(r"\]\(#(\w+)\)"), re.compile(r"\]\((?!#|https?:)([^)\s]+)")


def shown(value: float, spec: str = DEFAULT) -> str:
    """One number; what rounds to zero has no sign but a demanded one."""
    sign, rest = ("+", spec[1:]) if spec.startswith("+") else ("", spec)
    return format(value, f"{sign}z{rest}")


def spread(values: Collection[float], spec: str = DEFAULT) -> str:
    """Mean ± sample deviation; the number alone where there is one, or one count for all; a dash where there is none."""
    if not values:
        return NONE
    mean, around = shown(statistics.mean(values), spec), statistics.stdev(values) if len(values) > 1 else None
    return mean if around is None or (around == 0 and spec.endswith(".0f")) else f"{mean} ± {shown(around, spec.removeprefix('+'))}"


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

    def differences(self, claim: Claim, one: tuple[str, str], other: tuple[str, str] | float) -> list[float]:
        """Differences of two arms, each with its metric, of the same seeds.

        A number, and a net that others start from and that has seed 0 alone, stand beside every seed of the other.
        """
        left = self.measured(claim, *one)
        if not isinstance(other, tuple):
            return [value - other for value in left.values()]
        right = self.measured(claim, *other)
        alone = [arm.keep and tuple(arm.seeds) == (0,) for arm in (self.arm(claim, one[0]), self.arm(claim, other[0]))]
        if alone[1] and 0 in right:
            right = dict.fromkeys(left, right[0])
        elif alone[0] and 0 in left:
            left = dict.fromkeys(right, left[0])
        return [left[seed] - right[seed] for seed in left if seed in right]

    def filled(self, claim: Claim, text: str) -> str:
        """A claim's text with its numbers: `{arm.metric}`, `{arm.metric - other.metric:.1f}`, `{CLAIM/arm.metric}`; `{{` is a brace.

        With the format `interval`, the mean of a difference and its 95 % interval.

        Raises:
            UsageError: one of them names an arm or a metric that does not exist.
            ValueError: it is no number.
        """
        return _Numbers(self, claim).format(text)


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
        return (self.evidence.differences(self.claim, one, others[0]), "+"), field_name  # type: ignore[arg-type]

    def format_field(self, value: tuple[list[float], str], format_spec: str) -> str:
        """Mean ± deviation, or mean and interval."""
        values, sign = value
        if format_spec == "interval" and values:
            return with_interval(values, f"+{DEFAULT}")
        return spread(values, sign + (format_spec or DEFAULT).removeprefix("+")) if values else MISSING


def read_evidence(claims_dir: Path, records_dir: Path) -> Evidence:
    """Claim files and records.

    Raises:
        UsageError: one of them is not as it should be, or a record has a claim or an arm that is in no file.
    """
    claims = load_claims(claims_dir)
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in read_records(records_dir):
        if record.claim not in claims or record.arm not in claims[record.claim].arms:
            raise UsageError(f"{records_dir}: {record.claim}/{record.arm} must be an arm of a claim in {claims_dir}")
        runs.setdefault((record.claim, record.arm), {})[record.seed] = record
    return Evidence(claims, runs)


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean of paired differences, 95 %, by Student's t (a paired t-test at 5 %); None of fewer than two."""
    if len(differences) < 2:
        return None
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    reach = error * float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1))
    return round(mean - reach, _DIGITS), round(mean + reach, _DIGITS)


def with_interval(differences: Sequence[float], spec: str) -> str:
    """Mean and interval of paired differences; of one the number alone."""
    mean, around = shown(statistics.mean(differences), spec), interval(differences)
    return mean if around is None else f"{mean} [{', '.join(shown(end, spec) for end in around)}]"


@dataclass(frozen=True)
class Found:
    """An expectation, and the differences arm - than of all pairs of seeds."""

    expectation: Expectation
    differences: tuple[float, ...]

    @property
    def answer(self) -> str:
        """Whether the difference is where it should be: yes and no where all of the interval says so."""
        around, margin = interval(self.differences), self.expectation.margin
        if around is None or len(self.differences) < SEEDS:
            return OPEN
        ends = {"higher": (margin, math.inf), "lower": (-math.inf, -margin), "within": (-margin, math.inf), "near": (-margin, margin)}
        low, high = ends[self.expectation.direction]
        if low < around[0] and around[1] < high:
            return YES
        return NO if around[1] < low or around[0] > high else SMALL

    @property
    def difference(self) -> str:
        """Mean and interval, or the mean alone; a dash where there is none."""
        return with_interval(self.differences, f"+{self.expectation.format.removeprefix('+')}") if self.differences else NONE

    @property
    def wanted(self) -> str:
        """Where the difference should be."""
        margin, below = f"{self.expectation.margin:g}", f"{'-' * (self.expectation.margin > 0)}{self.expectation.margin:g}"
        texts = {"near": f"within ±{margin}", "higher": f"above {margin}", "lower": f"below {below}", "within": f"above {below}"}
        return texts[self.expectation.direction]


def find(claim: Claim, evidence: Evidence) -> list[Found]:
    """All expectations of a claim; the first is its primary one.

    Raises:
        UsageError: there are runs, but none has the metric.
    """
    found = []
    for one in claim.expect:
        than = (one.than, one.metric) if isinstance(one.than, str) else float(one.than)
        found.append(Found(one, tuple(evidence.differences(claim, (one.arm, one.metric), than))))
    return found


def pages(evidence: Evidence) -> dict[str, str]:
    """The files: what all claims share, and one for each claim.

    Raises:
        UsageError: one line that says which file is not as it should be.
    """
    own = {claim.id.lower(): f"{claim.id}.md" for claim in evidence.claims.values()}
    introduction = (Path(__file__).parent / "introduction.md").read_text(encoding="utf-8").rstrip()
    overview = markdown(
        ["claim", "primary expectation", "difference", "expected", "verdict"],
        [_overview(claim, evidence) for claim in evidence.claims.values()],
    )
    shared = "\n\n".join((introduction, _places(evidence), overview))
    files = {PAGE: _ANCHOR.sub(lambda found: f"]({RESULTS}/{own[found[1]]})", shared) + "\n"}
    for claim in evidence.claims.values():
        body = _RELATIVE.sub(r"](../\1", section(claim, evidence))
        files[f"docs/{RESULTS}/{claim.id}.md"] = _ANCHOR.sub(lambda found: f"]({own[found[1]]})", body)
    return files


def _places(evidence: Evidence) -> str:
    """Where the runs were made, and with what."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for claim in evidence.claims.values():
        for record in evidence.of_claim(claim):
            versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()) if version)
            groups[f"{record.machine}; {record.device}; {versions}"].append(record)
    lines = []
    for place, records in groups.items():
        days = sorted({record.date for record in records})
        lines.append(f"- {place}: {spent(records)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}")
    return "\n".join(("**Where** the runs were made:", "", *sorted(lines)))


def _overview(claim: Claim, evidence: Evidence) -> list[str]:
    """Cells of a claim's line."""
    measured = "measured" if evidence.of_claim(claim) else "not run yet"
    cells = ["", "", "", measured if claim.arms else "drawn from the others"]
    for one in find(claim, evidence)[:1]:
        cells = [one.expectation.what, one.difference, one.wanted, one.answer]
    return [f"[{claim.id}](#{claim.id.lower()}) {claim.title}", *cells]


def section(claim: Claim, evidence: Evidence) -> str:
    """The page of one claim, seen from `docs/`: what is said, what follows, what was measured, and what runs it again."""
    found, own = find(claim, evidence), evidence.of_claim(claim)
    source = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", claim.source)
    parts = [f"# {claim.id}: {claim.title}", f"Source: {source}.", f"> {claim.statement}".replace("\n", "\n> ")]
    for primary in found[:1]:
        seeds = f"{len(primary.differences)} seed{'s' * (len(primary.differences) != 1)}"
        difference = f"{primary.difference} over {seeds}; " if primary.differences else ""
        parts.append(f"**{claim.id}: {primary.answer}.** {primary.expectation.what}: {difference}expected {primary.wanted}.")
    parts += [evidence.filled(claim, claim.why), *_shown(claim, evidence, found[1:])]
    if own:
        made = f"`python -m evidence run {claim.id}` makes these runs ({spent(own)})"
        parts.append(f"{made}; records: [{RECORDS}/{claim.id}.jsonl](../{RECORDS}/{claim.id}.jsonl).")
    else:
        parts.append("No runs of its own.")
    retired: dict[str, list[str]] = defaultdict(list)
    for arm in claim.arms.values():
        if arm.retired:
            retired[arm.retired].append(f"`{arm.name}`")
    for why, names in retired.items():
        parts.append(f"Made by an older version, whose commit their records name: {', '.join(names)} ({why}).")
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(claim: Claim, evidence: Evidence, beside: Sequence[Found]) -> Iterator[str]:
    """Tables, differences, pictures."""
    for table in claim.tables:
        yield table.caption
        yield results(claim, table, evidence)
    if beside:
        yield "Further differences, described and not judged:"
        rows = [[one.expectation.what, one.difference, one.wanted, str(len(one.differences))] for one in beside]
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
        cells = [spread(evidence.values(claim, arm, metric).values(), table.formats.get(metric, DEFAULT)) for metric in table.columns]
        rows.append([table.labels.get(arm) or evidence.arm(claim, arm).label, *cells, str(len(evidence.records(claim, arm)))])
    return markdown(["", *table.columns.values(), "seeds"], rows)


def made(root: Path, evidence: Evidence) -> dict[str, str]:
    """The files that are made, by name below the root of the repository.

    Raises:
        UsageError: claims or records are not as they should be.
    """
    text = (root / README).read_bytes().decode()
    (before, rest), claim = text.split(BEGIN), evidence.claims[HEADLINE]
    after = rest.split(END)[1]
    block = f"{BEGIN}\n\n{evidence.filled(claim, claim.readme)}\n\nAll claims, with runs: [{PAGE}]({PAGE}).\n\n{END}"
    return pages(evidence) | {README: before + block + after}


def write(root: Path) -> None:
    """Write page, figures and the part of the README below the root of the repository, each whole or not at all; of a mistake nothing."""
    evidence = read_evidence(root / CLAIMS, root / RECORDS)
    files = made(root, evidence)
    for claim in evidence.claims.values():
        for figure in claim.figures:
            found = drawing.gather(claim, figure, evidence)
            if found.series:
                drawing.write(figure, found, root / FIGURES)
    for name, text in files.items():
        write_text(root / name, text)


def check(root: Path) -> list[str]:
    """What is not as claims and records say: a line each, nothing where all is up to date. Pictures are not looked at."""
    evidence, stale = read_evidence(root / CLAIMS, root / RECORDS), []
    for name, wanted in made(root, evidence).items():
        if not (root / name).is_file() or (root / name).read_bytes() != wanted.encode():
            stale.append(f"{root / name}: not what {RECORDS}/ says, {MAKE} writes it")
    return stale
