"""`docs/results.md`, `docs/results/CLAIM.md` and the results in the README, made of claims and records alone.

They are the same bytes wherever they are made.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from qat.errors import UsageError
from qat.utils.files import write_text
from studies import drawing, verdict
from studies.claims import Claim, Expectation, Figure, Table
from studies.evidence import DEFAULT, NONE, Evidence, read_evidence, shown, spread
from studies.records import Record

CLAIMS, RESULTS, FIGURES, PAGE, README = "studies/claims", "results", "docs/figures", "docs/results.md", "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEADLINE, OURS = "AIM", "ours"
MAKE = "python -m studies page"
USUAL = {"top1": "top-1, %", "val_top1": "validation top-1, %"}
OWN_PAGES = "results"  # folder below docs/
# Links to a claim, and those that are relative to docs/.
_ANCHOR, _RELATIVE = re.compile(r"\]\(#(\w+)\)"), re.compile(r"\]\((?!#|https?:)([^)\s]+)")
_ARXIV, _LINK = re.compile(r"arXiv (\d{4}\.\d{4,5})"), r"[\g<0>](https://arxiv.org/abs/\1)"


def render(evidence: Evidence) -> str:
    """The page.

    Raises:
        UsageError: one line that says which file is not as it should be.
    """
    introduction = (Path(__file__).parent / "introduction.md").read_text(encoding="utf-8").rstrip()
    overview = [_overview(claim, evidence) for claim in evidence.claims.values()]
    parts = [introduction, _places(evidence), markdown(["claim", "primary expectation", "difference", "expected", "verdict"], overview)]
    return "\n\n".join(parts) + "\n\n" + "\n".join(section(claim, evidence) for claim in evidence.claims.values())


def pages(evidence: Evidence) -> dict[str, str]:
    """The page as files: what all claims share in one, and one for each claim.

    Raises:
        UsageError: one line that says which file is not as it should be.
    """
    shared, *sections = re.split(r"^(?=<a id=)", render(evidence), flags=re.MULTILINE)
    own = {claim.id.lower(): f"{claim.id}.md" for claim in evidence.claims.values()}
    files = {PAGE: _ANCHOR.sub(lambda found: f"]({OWN_PAGES}/{own[found[1]]})", shared).rstrip() + "\n"}
    for claim, text in zip(evidence.claims.values(), sections, strict=True):
        body = _RELATIVE.sub(r"](../\1", text.partition("\n\n")[2]).rstrip() + "\n"
        files[f"docs/{OWN_PAGES}/{claim.id}.md"] = _ANCHOR.sub(lambda found: f"]({own[found[1]]})", body).replace("## ", "# ", 1)
    return files


def _places(evidence: Evidence) -> str:
    """Where the runs were made, and with what."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for claim in evidence.claims.values():
        for record in evidence.of_claim(claim):
            versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()) if version)
            groups[f"{record.machine}; {record.device}; {versions}"].append(record)
    if not groups:
        return "**Where.** No runs yet."
    days = {place: sorted({record.date for record in records}) for place, records in groups.items()}
    lines = [f"- {place}: {spent(groups[place])}, {' to '.join(dict.fromkeys((on[0], on[-1])))}" for place, on in sorted(days.items())]
    return "\n".join(("**Where** the runs were made:", "", *lines))


def _overview(claim: Claim, evidence: Evidence) -> list[str]:
    """Cells of a claim's line."""
    found = verdict.find(claim, evidence)[:1]
    primary = [cell for one in found for cell in (one.expectation.what, _difference(one), _wanted(one.expectation), one.answer)]
    measured = "measured" if evidence.of_claim(claim) else "not run yet"
    *cells, said = primary or ["", "", "", measured if claim.arms else "drawn from the others"]
    return [f"[{claim.id}](#{claim.id.lower()}) {claim.title}", *cells, said]


def section(claim: Claim, evidence: Evidence) -> str:
    """The part of one claim, seen from `docs/`: what is said, what follows, what was measured, and what runs it again."""
    found = verdict.find(claim, evidence)
    parts = [
        f'<a id="{claim.id.lower()}"></a>',
        f"## {claim.id}: {claim.title}",
        f"Source: {_ARXIV.sub(_LINK, claim.source)}.",
        f"> {claim.statement}".replace("\n", "\n> "),
        *(_answered(claim, one) for one in found[:1]),
        evidence.filled(claim, claim.why),
        *_shown(claim, evidence, found[1:]),
        _made(claim, evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _answered(claim: Claim, primary: verdict.Found) -> str:
    one = primary.expectation
    seeds = f"{len(primary.differences)} seed{'s' * (len(primary.differences) != 1)}"
    said = f"{_difference(primary)} over {seeds}; expected {_wanted(one)}" if primary.differences else f"expected {_wanted(one)}"
    return f"**{claim.id}: {primary.answer}.** {one.what}: {said}."


def _shown(claim: Claim, evidence: Evidence, beside: Sequence[verdict.Found]) -> Iterator[str]:
    """Tables, differences, pictures, where anything of them has been run."""
    named = [arm for table in claim.tables for arm in table.rows] + [arm for figure in claim.figures for arm in figure.arms]
    if not any(evidence.records(claim, arm) for arm in (*claim.arms, *named)):
        return
    for table in tables_of(claim, evidence):
        yield table.caption
        yield results(claim, table, evidence)
    if beside:
        yield "Further differences, described and not judged:"
        yield differences(beside)
    for figure in claim.figures:
        if drawing.gather(claim, figure, evidence).series:
            yield picture(claim, figure, evidence, "figures")
            yield figure.caption and f"*{figure.caption}*"


def picture(claim: Claim, figure: Figure, evidence: Evidence, folder: str) -> str:
    """A figure with the names of what it shows."""
    return f"![{drawing.alt(claim, figure, evidence)}]({folder}/{figure.file})"


def _made(claim: Claim, evidence: Evidence) -> str:
    """The command, and where its records are."""
    own = evidence.of_claim(claim)
    if not claim.arms:
        return "No runs of its own."
    if not own:
        return f"No runs of its own yet: `python -m studies run {claim.id}` makes them."
    return f"`python -m studies run {claim.id}` makes these runs ({spent(own)}); records: [results/{claim.id}](../results/{claim.id})."


def spent(records: list[Record]) -> str:
    """How many runs, and their time."""
    seconds = math.fsum(record.wall_seconds or 0.0 for record in records)
    time = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return f"{len(records)} run{'s' * (len(records) != 1)}, {time} in all"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a cell may hold any text."""
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in (head, *rows)]
    lines = [f"| {' | '.join(line)} |" for line in escaped]
    return re.sub(r"\|  (?=\|)", "| ", "\n".join((lines[0], f"|{'---|' * len(head)}", *lines[1:])))


def tables_of(claim: Claim, evidence: Evidence) -> Sequence[Table]:
    """Those of its file; without any, one of all its arms with those of the usual metrics that they have."""
    if claim.tables or not claim.arms:
        return claim.tables
    found = {name: head for name, head in USUAL.items() if any(evidence.values(claim, arm, name) for arm in claim.arms)}
    return (Table(tuple(claim.arms), found),) if found else ()


def results(claim: Claim, table: Table, evidence: Evidence) -> str:
    """Mean ± deviation over seeds; a dash where there is no run.

    Raises:
        UsageError: all arms have runs, and none has the metric of a column.
    """
    is_complete = all(evidence.records(claim, arm) for arm in table.rows)
    for metric in table.columns:
        if is_complete and not any(metric in record.values for arm in table.rows for record in evidence.records(claim, arm)):
            raise UsageError(f"{claim.file}: columns {metric!r} of a table: must be a metric of one of its rows")
    rows = []
    for arm in table.rows:
        cells = [_cell(claim, arm, metric, table, evidence) for metric in table.columns]
        rows.append([_label(claim, table, arm, evidence), *cells, str(len(evidence.records(claim, arm)))])
    return markdown(["", *table.columns.values(), "seeds"], rows)


def _label(claim: Claim, table: Table, arm: str, evidence: Evidence) -> str:
    return table.labels.get(arm) or evidence.arm(claim, arm).label


def _cell(claim: Claim, arm: str, metric: str, table: Table, evidence: Evidence) -> str:
    values = evidence.values(claim, arm, metric)
    of_fewer = f" (of {len(values)})" if values and len(values) < len(evidence.records(claim, arm)) else ""
    return spread(list(values.values()), table.formats.get(metric, DEFAULT)) + of_fewer


def differences(found: Sequence[verdict.Found]) -> str:
    """The differences arm - other arm of seeds that belong together."""
    rows = [[one.expectation.what, _difference(one), _wanted(one.expectation), str(len(one.differences))] for one in found]
    return markdown(["", "difference", "expected", "seeds"], rows)


def _difference(found: verdict.Found) -> str:
    """Mean and interval, or the mean alone; a dash where there is none."""
    spec, around = f"+{found.expectation.format.removeprefix('+')}", verdict.interval(found.differences)
    if not found.differences:
        return NONE
    mean = shown(statistics.mean(found.differences), spec)
    return mean if around is None else f"{mean} [{', '.join(shown(end, spec) for end in around)}]"


def _wanted(one: Expectation) -> str:
    margin, below = f"{one.margin:g}", f"{'-' * (one.margin > 0)}{one.margin:g}"
    return {"near": f"within ±{margin}", "higher": f"above {margin}", "lower": f"below {below}", "within": f"above {below}"}[one.direction]


def readme_block(evidence: Evidence) -> str:
    """What the README says between its two marks: the headline's words, which of its aims were reached, how the claims came out.

    Raises:
        UsageError: there is no claim of the headline.
    """
    if HEADLINE not in evidence.claims:
        raise UsageError(f"{CLAIMS}: must have the claim {HEADLINE}, for the README")
    claim = evidence.claims[HEADLINE]
    parts = (BEGIN, evidence.filled(claim, claim.readme), _aims(evidence), _count(evidence), END)
    return "\n\n".join(part for part in parts if part)


def _aims(evidence: Evidence) -> str:
    """What was aimed at, an entry each."""
    found = [one for claim in evidence.claims.values() for one in verdict.find(claim, evidence) if one.expectation.aim]
    lines = [f"- {one.expectation.what}: {_reached(one)}" for one in found]
    missed = "*missed*: the mean is below the aim, whether or not the interval is"
    head = f"Aims, each with the difference that was measured and its 95 % interval; {missed}:"
    return "\n".join([head, "", *lines]) if lines else ""


def _reached(one: verdict.Found) -> str:
    if not one.differences:
        return "not run yet"
    seeds = f"{len(one.differences)} seed{'s' * (len(one.differences) != 1)}"
    said = verdict.OPEN if len(one.differences) < verdict.SEEDS else "reached" if one.is_reached else "*missed*"
    return f"{_difference(one)}, {seeds}, {said}"


def _count(evidence: Evidence) -> str:
    """How many claims of the papers came out how, and how many of ours, by their primary expectations."""
    counted: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for claim in evidence.claims.values():
        if claim.expect:
            counted[claim.source.startswith(OURS)][verdict.find(claim, evidence)[0].answer] += 1
    order = (verdict.YES, verdict.NO, verdict.SMALL, verdict.OPEN)
    papers, ours = (", ".join(f"{found[name]} {name}" for name in order if found[name]) for found in counted.values())
    beside = f" Of our own: {ours}." if ours else ""
    return f"What the papers claim, seen here: {papers or 'none yet'}.{beside} All of it, with runs: [{PAGE}]({PAGE})."


def made(root: Path, evidence: Evidence) -> dict[str, str]:
    """The files that are made, by name below the root of the repository.

    Raises:
        UsageError: claims or records are not as they should be, or the README lacks its marks.
    """
    text = (root / README).read_bytes().decode()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{root / README}: must have {BEGIN} once and {END} once behind it")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    return pages(evidence) | {README: before + readme_block(evidence) + after}


def write(root: Path) -> None:
    """Write page, figures and the part of the README below the root of the repository, each whole or not at all; of a mistake nothing."""
    evidence = read_evidence(root / CLAIMS, root / RESULTS)
    files = made(root, evidence)
    for claim in evidence.claims.values():
        for figure in claim.figures:
            drawing.write(claim, figure, evidence, root / FIGURES)
    for name, text in files.items():
        write_text(root / name, text)


def check(root: Path) -> list[str]:
    """What is not as claims and records say: a line each, nothing where all is up to date. Pictures must be there, no more."""
    evidence = read_evidence(root / CLAIMS, root / RESULTS)
    figures = [(claim, figure) for claim in evidence.claims.values() for figure in claim.figures]
    stale = [
        f"{root / FIGURES / figure.file}: missing, {MAKE} draws it"
        for claim, figure in figures
        if drawing.gather(claim, figure, evidence).series and not (root / FIGURES / figure.file).is_file()
    ]
    for name, wanted in made(root, evidence).items():
        if not (root / name).is_file() or (root / name).read_bytes() != wanted.encode():
            stale.append(f"{root / name}: not what {RESULTS}/ says, {MAKE} writes it")
    return stale
