"""Write `docs/accuracy.md`, `evidence/pages/CLAIM.md` and the results in the README.

All of them are computed from claims and records.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from evidence.claims.claim import Claim, Table, load_claim
from evidence.claims.records import Record
from evidence.pages import drawing
from evidence.pages.comparison import MIXED, VERDICTS, Comparison, compare
from evidence.pages.evidence import Evidence, read_evidence
from evidence.pages.numbers import DEFAULT_FORMAT, SEEDS, spread
from evidence.speed.timing import table as markdown
from qat.utils.files import write_text

CLAIMS = "evidence/claims"
RECORDS = "evidence/records"
PAGES = "evidence/pages"
OVERVIEW = "evidence/pages/accuracy.yaml"
OVERVIEW_PAGE = "docs/accuracy.md"
OVERVIEW_FIGURES = "docs/figures"
README = "README.md"
# Markers around the results in the README.
BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"
COMMAND = "python -m evidence page"
MIXED_NOTE = f"{MIXED} Some pairs ran on two CPU types, which changes a top-1 by up to 0.2 points."
# Links in a claim's text, relative to docs/.
_RELATIVE = re.compile(r"\]\((?!#|https?:)([^)\s]+)")


def pages(evidence: Evidence) -> dict[str, str]:
    """The pages of claims, by name.

    Raises:
        UsageError: a claim file is not valid; the message is one line and names the file.
    """
    texts = {}
    for claim in evidence.claims.values():
        texts[f"{PAGES}/{claim.id}.md"] = section(claim, evidence)
    return texts


def overview(evidence: Evidence, claim: Claim) -> str:
    """`docs/accuracy.md`: the text of `accuracy.yaml`, with numbers and the verdicts of all claims.

    Args:
        evidence: all claims and records.
        claim: `accuracy.yaml`, which is read like a claim.
    """
    of_papers = []
    ours = []
    for other in evidence.claims.values():
        if not other.expect or not compare(other, evidence)[0].differences:
            continue
        if other.source.startswith("ours"):
            ours.append(other)
        else:
            of_papers.append(other)
    answers = [compare(other, evidence)[0].verdict for other in of_papers]
    counts = []
    for verdict in VERDICTS:
        if verdict in answers:
            counts.append(f"{answers.count(verdict)} {verdict}")
    words = {
        "counts": ", ".join(counts),
        "papers": verdicts(of_papers, evidence),
        "own": verdicts(ours, evidence),
    }
    return evidence.filled(claim, claim.why, words) + "\n"


def verdicts(claims: Sequence[Claim], evidence: Evidence) -> str:
    """A table with the primary expectation of each claim."""
    rows = []
    any_mixed = False
    for claim in claims:
        primary = compare(claim, evidence)[0]
        any_mixed |= primary.mixed
        notes = []
        if len(primary.differences) != SEEDS:
            notes.append(f"{len(primary.differences)} seeds")
        if primary.expected != "above 0":
            notes.append(f"expected {primary.expected}")
        what = primary.expectation.what
        if notes:
            what = f"{what} ({'; '.join(notes)})"
        difference = f"{primary.difference}{MIXED * primary.mixed}"
        rows.append([claim.id, what, difference, primary.verdict])
    table = markdown(["claim", "compared", "difference", "verdict"], rows)
    return f"{table}\n\n{MIXED_NOTE}" if any_mixed else table


def section(claim: Claim, evidence: Evidence) -> str:
    """The page of a claim: statement, verdict, measurements, and the command that repeats them."""
    comparisons = compare(claim, evidence)
    source = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", claim.source)
    statement = claim.statement.replace("\n", "\n> ")
    parts = [
        f"# {claim.id}: {claim.title}",
        _links_from_pages(f"Source: {source}."),
        _links_from_pages(f"> {statement}"),
    ]
    if comparisons:
        parts.append(_verdict_line(claim, comparisons[0]))
    parts.append(_links_from_pages(evidence.filled(claim, claim.why)))
    parts += _tables_and_figures(claim, evidence, comparisons[1:])
    parts.append(_origin(claim, evidence.of_claim(claim)))
    parts += _retired_arms(claim)
    if any(comparison.mixed for comparison in comparisons):
        parts.append(MIXED_NOTE)
    return "\n\n".join(filter(None, parts)) + "\n"


def _links_from_pages(text: str) -> str:
    return _RELATIVE.sub(r"](../../docs/\1", text)


def _verdict_line(claim: Claim, primary: Comparison) -> str:
    difference = ""
    if primary.differences:
        plural = "s" * (len(primary.differences) != 1)
        difference = f"{primary.difference} over {primary.seeds} seed{plural}; "
    return (
        f"**{claim.id}: {primary.verdict}.** {primary.expectation.what}: "
        f"{difference}expected {primary.expected}."
    )


def _origin(claim: Claim, records: list[Record]) -> str:
    """The command that executes the claim's runs, and the file with the records."""
    if not records:
        return "No runs of its own."
    command = f"`python -m evidence run {claim.id}` makes these runs ({time_spent(records)})"
    file = f"{claim.id}.jsonl"
    return f"{command}; records: [{RECORDS}/{file}](../records/{file})."


def _retired_arms(claim: Claim) -> Iterator[str]:
    retired: dict[str, list[str]] = defaultdict(list)
    for arm in claim.arms.values():
        if arm.retired:
            retired[arm.retired].append(f"`{arm.name}`")
    for why, names in retired.items():
        yield (
            "Made by an older version, whose commit their records name: "
            f"{', '.join(names)} ({why})."
        )


def _tables_and_figures(
    claim: Claim, evidence: Evidence, secondary: Sequence[Comparison]
) -> Iterator[str]:
    for table in claim.tables:
        yield table.caption
        yield results(claim, table, evidence)
    if secondary:
        yield "Further differences, not judged:"
        rows = []
        for entry in secondary:
            rows.append([entry.expectation.what, entry.difference, entry.expected, entry.seeds])
        yield markdown(["", "difference", "expected", "seeds"], rows)
    for figure in claim.figures:
        content = drawing.gather(claim, figure, evidence)
        if content.series:
            yield f"![{drawing.alt(figure, content)}](figures/{figure.file})"
            yield figure.caption and f"*{figure.caption}*"


def time_spent(records: list[Record]) -> str:
    """Number of runs, and their time."""
    seconds = math.fsum(record.wall_seconds or 0.0 for record in records)
    time = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return f"{len(records)} run{'s' * (len(records) != 1)}, {time} in all"


def results(claim: Claim, table: Table, evidence: Evidence) -> str:
    """A table with mean ± deviation over seeds; a dash without runs."""
    rows = []
    for arm in table.rows:
        row = [table.labels.get(arm) or evidence.arm(claim, arm).label]
        for metric in table.columns:
            values = evidence.values(claim, arm, metric).values()
            row.append(spread(values, table.formats.get(metric, DEFAULT_FORMAT)))
        row.append(str(len(evidence.records(claim, arm))))
        rows.append(row)
    return markdown(["", *table.columns.values(), "seeds"], rows)


def generated_files(root: Path, evidence: Evidence) -> dict[str, str]:
    """Text of all generated files, by name relative to the root of the repository.

    Raises:
        UsageError: claims or records are not valid.
    """
    claim = load_claim(root / OVERVIEW)
    text = (root / README).read_bytes().decode()
    before, rest_of_text = text.split(BEGIN)
    after = rest_of_text.split(END)[1]
    block = f"{BEGIN}\n\n{evidence.filled(claim, claim.readme)}\n\n{END}"
    files = pages(evidence)
    files[OVERVIEW_PAGE] = overview(evidence, claim)
    files[README] = before + block + after
    return files


def write(root: Path) -> None:
    """Write pages, figures and the results in the README, each whole; nothing after an error."""
    evidence = read_evidence(root / CLAIMS, root / RECORDS)
    files = generated_files(root, evidence)
    folders = [(claim, root / PAGES / "figures") for claim in evidence.claims.values()]
    folders.append((load_claim(root / OVERVIEW), root / OVERVIEW_FIGURES))
    for claim, folder in folders:
        for figure in claim.figures:
            content = drawing.gather(claim, figure, evidence)
            if content.series:
                drawing.write(figure, content, folder)
    for name, text in files.items():
        write_text(root / name, text)


def check(root: Path) -> list[str]:
    """A line for each page that differs from claims and records; figures are not compared."""
    evidence = read_evidence(root / CLAIMS, root / RECORDS)
    stale = []
    for name, text in generated_files(root, evidence).items():
        path = root / name
        if not path.is_file() or path.read_bytes() != text.encode():
            stale.append(f"{path}: not what {RECORDS}/ says, {COMMAND} writes it")
    return stale
