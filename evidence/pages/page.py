"""Write `docs/accuracy.md`, the pages of claims and papers, and the results in the README.

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
from evidence.pages.comparison import VERDICTS, Comparison, compare, judged
from evidence.pages.evidence import Evidence, read_evidence
from evidence.pages.numbers import DEFAULT_FORMAT, MIXED, SEEDS, spread
from evidence.speed.timing import table as markdown
from qat.utils.files import write_text
from qat.utils.text import format_count

CLAIMS = "evidence/claims"
RECORDS = "evidence/records"
PAGES = "evidence/pages"
OVERVIEW = "evidence/pages/accuracy.yaml"
OVERVIEW_PAGE = "docs/accuracy.md"
PAPERS = "evidence/pages/papers.yaml"
PAPERS_PAGE = "evidence/pages/PAPERS.md"
OVERVIEW_FIGURES = "docs/figures"
README = "README.md"
# Markers around the results in the README.
BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"
COMMAND = "python -m evidence page"
MIXED_NOTE = (
    f"{MIXED} Some pairs ran on two CPU types, which changes a top-1 by up to 0.2 points. Records "
    "until 2026-11-28 name a CPU by its marketing name only, so unmarked pairs may mix types too."
)
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
    primary = []
    further = []
    for other in of_papers:
        first, *others = judged(compare(other, evidence))
        primary.append(first)
        further += others
    words = {
        "counts": _counts(primary),
        "further_counts": _counts(further),
        "papers": verdicts(of_papers, evidence),
        "own": verdicts(ours, evidence),
        "mixed_note": MIXED_NOTE,
    }
    return evidence.filled(claim, claim.why, words) + "\n"


def papers(evidence: Evidence, claim: Claim) -> str:
    """`evidence/pages/PAPERS.md`: tables and figures of the papers with results and verdicts.

    Args:
        evidence: all claims and records.
        claim: `papers.yaml`, which is read like a claim. `{C1#0}` in its text is the difference
            and the verdict of the first judged expectation of C1, `{C1#1}` of the second.
    """
    words = {"mixed_note": MIXED_NOTE}
    for other in evidence.claims.values():
        for number, comparison in enumerate(judged(compare(other, evidence))):
            difference = f"{comparison.difference}{MIXED * comparison.mixed}"
            words[f"{other.id}#{number}"] = f"{difference} | {comparison.verdict}"
    return evidence.filled(claim, claim.why, words) + "\n"


def _counts(comparisons: Sequence[Comparison]) -> str:
    """How often each verdict occurs."""
    answers = [comparison.verdict for comparison in comparisons]
    counts = []
    for verdict in VERDICTS:
        if verdict in answers:
            counts.append(f"{answers.count(verdict)} {verdict}")
    return ", ".join(counts)


def verdicts(claims: Sequence[Claim], evidence: Evidence) -> str:
    """A table with the judged expectations of each claim, the primary one first."""
    rows = []
    for claim in claims:
        for comparison in judged(compare(claim, evidence)):
            notes = []
            if len(comparison.differences) != SEEDS:
                notes.append(format_count(len(comparison.differences), "seed"))
            if comparison.expected != "above 0":
                notes.append(f"expected {comparison.expected}")
            what = comparison.expectation.what
            if notes:
                what = f"{what} ({'; '.join(notes)})"
            difference = f"{comparison.difference}{MIXED * comparison.mixed}"
            rows.append([claim.id, what, difference, comparison.verdict])
    return markdown(["claim", "compared", "difference", "verdict"], rows)


def section(claim: Claim, evidence: Evidence) -> str:
    """The page of a claim: statement, verdict, measurements, and the command for its runs."""
    comparisons = compare(claim, evidence)
    source = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", claim.source)
    statement = claim.statement.replace("\n", "\n> ")
    parts = [
        f"# {claim.id}: {claim.title}",
        _links_from_pages(f"Source: {source}."),
        _links_from_pages(f"> {statement}"),
    ]
    for comparison in judged(comparisons):
        parts.append(_verdict_line(claim, comparison))
    parts.append(_links_from_pages(evidence.filled(claim, claim.why)))
    others = [other for other in comparisons if other not in judged(comparisons)]
    parts += _tables_and_figures(claim, evidence, others)
    parts.append(_origin(claim, evidence.of_claim(claim)))
    parts += _retired_arms(claim)
    text = "\n\n".join(filter(None, parts))
    return with_mixed_note(text) + "\n"


def with_mixed_note(text: str) -> str:
    """Add an explanation of the marks to a text that contains them."""
    return f"{text}\n\n{MIXED_NOTE}" if MIXED in text else text


def _links_from_pages(text: str) -> str:
    return _RELATIVE.sub(r"](../../docs/\1", text)


def _verdict_line(claim: Claim, comparison: Comparison) -> str:
    difference = ""
    if comparison.differences:
        plural = "s" * (len(comparison.differences) != 1)
        difference = f"{comparison.difference} over {comparison.seeds} seed{plural}; "
    return (
        f"**{claim.id}: {comparison.verdict}.** {comparison.expectation.what}: "
        f"{difference}expected {comparison.expected}."
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
            "Runs of an older version, whose commit is in their records: "
            f"{', '.join(names)} ({why})."
        )


def _tables_and_figures(
    claim: Claim, evidence: Evidence, secondary: Sequence[Comparison]
) -> Iterator[str]:
    for table in claim.tables:
        yield table.caption
        yield results(claim, table, evidence)
    if secondary:
        yield "Further differences, which get no verdict:"
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
    """Number of runs, their total time, and the number of runs without a measured time."""
    seconds = math.fsum(record.wall_seconds or 0.0 for record in records)
    time = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    text = f"{len(records)} run{'s' * (len(records) != 1)}, {time} in all"
    num_unknown = sum(record.wall_seconds is None for record in records)
    return f"{text}, not counting {num_unknown} of unknown time" if num_unknown else text


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
    results_text = with_mixed_note(evidence.filled(claim, claim.readme))
    block = f"{BEGIN}\n\n{results_text}\n\n{END}"
    files = pages(evidence)
    files[PAPERS_PAGE] = papers(evidence, load_claim(root / PAPERS))
    files[OVERVIEW_PAGE] = overview(evidence, claim)
    files[README] = before + block + after
    return files


def write(root: Path) -> None:
    """Write pages, figures and the results in the README, after all texts were computed."""
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
            stale.append(f"{path}: differs from {RECORDS}/; `{COMMAND}` writes it")
    return stale
