"""`docs/results.md` and the results in the README, made of claims and records alone: the same bytes wherever they are made."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from qat.utils.files import write_text
from studies import figures, prose, tables, verdict
from studies.checks import wrong
from studies.claims import CLAIM, Claim, Table
from studies.evidence import Evidence, read_evidence
from studies.records import Record
from studies.sections import command_of, picture, section, spent

CLAIMS, RESULTS, FIGURES, PAGE, README = "studies/claims", "results", "docs/figures", "docs/results.md", "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEADLINE, OURS = "AIM", "ours"
MAKE = "python -m studies page"

_INTRODUCTION = f"""# Results

What the papers claim, and what we claim beside them, run on CIFAR-10. `{MAKE}` makes this page of the [claims](../studies/claims)
and of one file for every run; no measured number in it is typed. `python -m studies run C1 --root FOLDER`, with the folder of CIFAR-10's
parquet files, makes those runs of a claim that are not there yet. Command, seed, versions and commit of a run are in its file.

**±** is the sample standard deviation over seeds; a number without it is one run. Differences are between runs with the same seed, so that
one between an arm of one seed and an arm of three is of one pair; only the float net that all others start from stands beside every seed.

**Verdicts.** An expectation is *supported* when the differences of all seeds lie beyond its margin in the expected direction, and their
mean by more than {verdict.ERRORS:g} standard errors; *contradicted* when the same holds in the opposite direction; else *undecided*;
*open* below {verdict.SEEDS} seeds. A claim is *confirmed* when all its expectations are supported, *not confirmed* when none is,
else *mixed*; *not decided yet* while one is open. Three seeds are few: of differences that are nothing but chance this rule supports one in
eleven and contradicts as many, so a single expectation that is barely supported means little. The difference of "A against B" is A minus B.
Some expectations were added when other results of their claim had been seen: the text of the claim says which.

**Words.** A weight *oscillates* when its code flips in more than 0.5 % of the steps, averaged over the last hundred or so; *near a
threshold* is within 0.005 codes of one ([oscillation](oscillation.md)); curves of both begin at 0 where counting begins. A *look* is an
evaluation of all calibration images ([search](evolq.md)). *Roughness* is defined in [analysis](analysis.md). In the pictures small points
are seeds, bars their deviation."""


def render(claims_dir: Path, results_dir: Path) -> str:
    """The page.

    Raises:
        UsageError: one line that says which file is not as it should be.
    """
    return _render(read_evidence(claims_dir, results_dir))


def _render(evidence: Evidence) -> str:
    parts = [_INTRODUCTION, _places(evidence), _overview(evidence)]
    return "\n\n".join(parts) + "\n\n" + "\n".join(section(claim, evidence) for claim in evidence.claims.values())


def _places(evidence: Evidence) -> str:
    """Where the runs were made, and with what."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for claim in evidence.claims.values():
        for record in evidence.of_claim(claim):
            versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()) if version)
            groups[f"{record.machine}; {record.device}; {versions}"].append(record)
    if not groups:
        return "**Where.** No runs yet."
    lines = [f"- {place}: {spent(records)}, {_days(records)}" for place, records in sorted(groups.items())]
    return "\n".join(("**Where** the runs were made:", "", *lines))


def _days(records: list[Record]) -> str:
    days = sorted(record.date for record in records)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _overview(evidence: Evidence) -> str:
    """A row a claim, its verdict with a link to its section."""
    rows = [[claim.id, claim.title, f"[{_verdict(claim, evidence)}](#{claim.id.lower()})"] for claim in evidence.claims.values()]
    return tables.markdown(["claim", "", "verdict"], rows)


def _verdict(claim: Claim, evidence: Evidence) -> str:
    if not claim.arms:
        return "drawn from the others"
    found = verdict.verdict(verdict.judge(claim, evidence))
    return found or ("measured" if evidence.of_claim(claim) else "not run yet")


def readme_block(claims_dir: Path, results_dir: Path) -> str:
    """What the README says between its two marks: the first table of the headline, how the claims came out, two pictures.

    Raises:
        UsageError: as of `render`, or there is no claim of the headline.
    """
    return _readme_block(read_evidence(claims_dir, results_dir), claims_dir)


def _readme_block(evidence: Evidence, claims_dir: Path) -> str:
    if HEADLINE not in evidence.claims:
        raise wrong(claims_dir, "id", None, f"the README needs the claim {HEADLINE}")
    claim = evidence.claims[HEADLINE]
    found = tables.tables_of(claim, evidence)[:1]
    rows = [arm for table in found for arm in table.rows]
    cost = spent(_behind(claim, rows, evidence))
    parts = [
        BEGIN,
        *(tables.results(claim, table, evidence, is_whole=False) for table in found),
        *([prose.filled(claim, evidence, "readme")] if claim.readme else []),
        *_to_come(claim, found, evidence),
        f"Mean ± sample deviation over seeds; `{command_of(claim, rows)}` makes these runs ({cost}). {_count(evidence)}",
        *_pictures(evidence),
        END,
    ]
    return "\n\n".join(parts)


def _behind(claim: Claim, rows: Sequence[str], evidence: Evidence) -> list[Record]:
    """All records of the claims that some rows are of."""
    names = dict.fromkeys((claim.id, *(claim.place(arm)[0] for arm in rows)))
    return [record for name in names for record in evidence.of_claim(evidence.claims[name])]


def _to_come(claim: Claim, found: Sequence[Table], evidence: Evidence) -> list[str]:
    names = [name for table in found for name in tables.not_run(claim, table, evidence)]
    return [f"Not run yet: {'; '.join(names)}."] if names else []


def _count(evidence: Evidence) -> str:
    """How many claims of the papers came out how, and how many of ours."""
    counted = [claim for claim in evidence.claims.values() if CLAIM.fullmatch(claim.id) and claim.expect]
    papers, ours = (_counts([claim for claim in counted if claim.source.startswith(OURS) is own], evidence) for own in (False, True))
    beside = f" Of our own: {ours}." if ours else ""
    return f"Claims of the papers: {papers or 'none yet'}.{beside} All of them, with runs and commands: [{PAGE}]({PAGE})."


def _counts(claims: Sequence[Claim], evidence: Evidence) -> str:
    found = Counter(_verdict(claim, evidence) for claim in claims)
    order = (verdict.CONFIRMED, verdict.MIXED, verdict.NOT_CONFIRMED, verdict.NOT_DECIDED)
    return ", ".join(f"{found[name]} {name}" for name in order if found[name])


def _pictures(evidence: Evidence) -> list[str]:
    """Those marked for it."""
    return [
        f"{picture(claim, figure, evidence, FIGURES)}\n\n{(figure.caption or claim.title).rstrip('.')}: `{command_of(claim, figure.arms)}`."
        for claim in evidence.claims.values()
        for figure in claim.figures
        if figure.headline and not figures.is_empty(claim, figure, evidence)
    ]


def write(root: Path) -> None:
    """Write page, figures and the part of the README below the root of the repository, each whole or not at all.

    Raises:
        UsageError: as of `render`, or the README lacks its marks; then nothing is written.
    """
    evidence = read_evidence(root / CLAIMS, root / RESULTS)
    page, readme = _render(evidence), _readme(root, _readme_block(evidence, root / CLAIMS))
    for claim in evidence.claims.values():
        for figure in claim.figures:
            figures.write(claim, figure, evidence, root / FIGURES)
    write_text(root / PAGE, page)
    write_text(root / README, readme)


def _readme(root: Path, block: str) -> str:
    """The README with another block."""
    path = root / README
    text = path.read_bytes().decode()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise wrong(path, "marks", f"{text.count(BEGIN)} and {text.count(END)}", f"allowed is {BEGIN} once and {END} once behind it")
    before, _, rest = text.partition(BEGIN)
    return before + block + rest.partition(END)[2]


def check(root: Path) -> list[str]:
    """What is not as claims and records say: a line each, nothing where all is up to date. Pictures must be there, no more.

    Raises:
        UsageError: as of `write`.
    """
    evidence = read_evidence(root / CLAIMS, root / RESULTS)
    stale = [
        f"{root / FIGURES / figure.file}: missing, {MAKE} draws it"
        for claim in evidence.claims.values()
        for figure in claim.figures
        if not figures.is_empty(claim, figure, evidence) and not (root / FIGURES / figure.file).is_file()
    ]
    readme = _readme(root, _readme_block(evidence, root / CLAIMS))
    for name, wanted in ((PAGE, _render(evidence)), (README, readme)):
        path = root / name
        if not path.is_file() or path.read_bytes() != wanted.encode():
            stale.append(f"{path}: not what {RESULTS}/ says, {MAKE} writes it")
    return stale
