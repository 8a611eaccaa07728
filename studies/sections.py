"""The part of the page that one claim has: what is said, what was measured, what follows, and how to run it again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from studies import figures, prose, tables, verdict
from studies.claims import Claim, Figure
from studies.evidence import Evidence
from studies.records import Record

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def command_of(claim: Claim, arms: Iterable[str] = ()) -> str:
    """What makes the runs of a claim, and those of other claims (`C2/qkr_w2`) among `arms`."""
    others = (claim.place(arm)[0] for arm in arms)
    return f"python -m studies run {' '.join(dict.fromkeys((claim.id, *others)))}"


def section(claim: Claim, evidence: Evidence) -> str:
    """Markdown, seen from `docs/`.

    Raises:
        UsageError: the file names an arm or a metric that does not exist.
    """
    parts = [
        f'<a id="{claim.id.lower()}"></a>',
        f"## {claim.id}: {claim.title}",
        f"Source: {_ARXIV.sub(_link, claim.source)}.",
        f"> {claim.statement}".replace("\n", "\n> "),
        *_said(claim, evidence),
        *_shown(claim, evidence),
        prose.filled(claim, evidence),
        _made(claim, evidence),
        _commands(claim, evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _link(found: re.Match[str]) -> str:
    return f"[{found[0]}](https://arxiv.org/abs/{found[1]})"


def has_runs(claim: Claim, evidence: Evidence) -> bool:
    """Whether anything of what it shows or expects has been run."""
    shown = [arm for table in claim.tables for arm in table.rows] + [arm for figure in claim.figures for arm in figure.arms]
    return any(evidence.records(claim, arm) for arm in (*claim.arms, *shown))


def _said(claim: Claim, evidence: Evidence) -> Iterator[str]:
    """The verdict, on one line."""
    judged = verdict.judge(claim, evidence)
    if judged:
        yield f"**{claim.id}: {verdict.verdict(judged)}.** {verdict.summary(judged)}"


def _shown(claim: Claim, evidence: Evidence) -> Iterator[str]:
    """Tables, expectations, pictures."""
    if not has_runs(claim, evidence):
        return
    for number, table in enumerate(tables.tables_of(claim, evidence)):
        yield table.caption
        yield tables.results(claim, table, evidence, f"tables[{number}]")
    if judged := verdict.judge(claim, evidence):
        yield tables.expectations(judged)
    for figure in claim.figures:
        if not figures.is_empty(claim, figure, evidence):
            yield picture(claim, figure, evidence, "figures")
            yield figure.caption and f"*{figure.caption}*"


def picture(claim: Claim, figure: Figure, evidence: Evidence, folder: str) -> str:
    """A figure with the names of what it shows."""
    return f"![{figures.alt(claim, figure, evidence)}]({folder}/{figure.file})"


def _made(claim: Claim, evidence: Evidence) -> str:
    """The command, and where its records are."""
    own = evidence.of_claim(claim)
    if not claim.arms:
        return "No runs of its own."
    if not own:
        return f"No runs of its own yet: `{command_of(claim)}` makes them."
    return f"`{command_of(claim)}` makes these runs ({spent(own)}); records: [results/{claim.id}](../results/{claim.id})."


def spent(records: list[Record]) -> str:
    """How many runs, and their time."""
    seconds = math.fsum(record.wall_seconds or 0.0 for record in records)
    time = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return f"{len(records)} run{'s' * (len(records) != 1)}, {time} in all"


def _commands(claim: Claim, evidence: Evidence) -> str:
    """What every arm ran, folded away: those of its first seed."""
    firsts = [(arm, records[0]) for arm in claim.arms if (records := evidence.records(claim, arm))]
    if not firsts:
        return ""
    lines = []
    for arm, record in firsts:
        lines += [f"# {evidence.label(claim, arm)}, seed {record.seed}", record.command, *record.further_commands.values()]
    # Marked as text, not as commands of a shell: FOLDER and the runs that they start from stand for things that are not there.
    return "\n".join(("<details><summary>Commands of its arms</summary>", "", "```text", *lines, "```", "", "</details>"))
