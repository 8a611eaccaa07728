"""Markdown tables: what arms came to, and what became of expectations."""

from __future__ import annotations

from collections.abc import Sequence

from studies.checks import wrong
from studies.claims import Claim, Expectation, Table
from studies.evidence import Evidence
from studies.numbers import DEFAULT, spread
from studies.verdict import Judged

USUAL = {"top1": "top-1, %", "val_top1": "validation top-1, %"}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a cell may hold any text."""
    lines = [f"| {' | '.join(map(_cell, line))} |" for line in (head, *rows)]
    return "\n".join((lines[0], f"|{'---|' * len(head)}", *lines[1:])).replace("|  |", "| |")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def tables_of(claim: Claim, evidence: Evidence) -> tuple[Table, ...]:
    """Those of its file; without any, one of all its arms with those of the usual metrics that they have."""
    if claim.tables or not claim.arms:
        return claim.tables
    found = {name: head for name, head in USUAL.items() if any(evidence.values(claim, arm, name) for arm in claim.arms)}
    return (Table(tuple(claim.arms), found),) if found else ()


def not_run(claim: Claim, table: Table, evidence: Evidence) -> list[str]:
    """What the rows without a run are called."""
    return [_label(claim, table, arm, evidence) for arm in table.rows if not evidence.records(claim, arm)]


def _label(claim: Claim, table: Table, arm: str, evidence: Evidence) -> str:
    return table.labels.get(arm) or evidence.label(claim, arm)


def results(claim: Claim, table: Table, evidence: Evidence, key: str = "tables", *, is_whole: bool = True) -> str:
    """Mean ± deviation over seeds; a dash where there is no run, or not `is_whole` and no such row.

    Raises:
        UsageError: all arms have runs, and none has the metric of a column.
    """
    is_complete = all(evidence.records(claim, arm) for arm in table.rows)
    for metric in table.columns:
        if is_complete and all(evidence.is_unknown(claim, arm, metric) for arm in table.rows):
            raise wrong(claim.file, f"{key}.columns", metric, "no row has this metric")
    rows = []
    for arm in table.rows:
        count = len(evidence.records(claim, arm))
        if not count and not is_whole:
            continue
        cells = [_values(claim, arm, metric, table, evidence) for metric in table.columns]
        rows.append([_label(claim, table, arm, evidence), *cells, str(count)])
    return markdown(["", *table.columns.values(), "seeds"], rows)


def _values(claim: Claim, arm: str, metric: str, table: Table, evidence: Evidence) -> str:
    values = evidence.values(claim, arm, metric)
    of_fewer = f" (of {len(values)})" if values and len(values) < len(evidence.records(claim, arm)) else ""
    return spread(list(values.values()), table.formats.get(metric, DEFAULT)) + of_fewer


def expectations(judged: Sequence[Judged]) -> str:
    """The differences arm - other arm of seeds that belong together."""
    rows = [
        [
            one.expectation.what,
            spread(one.differences, one.expectation.format),
            _wanted(one.expectation),
            str(len(one.differences)),
            one.state,
        ]
        for one in judged
    ]
    return markdown(["expectation", "difference", "expected", "seeds", "outcome"], rows)


def _wanted(one: Expectation) -> str:
    margin = f"{one.margin:g}"
    if one.direction == "near":
        return f"within ±{margin}"
    if one.direction == "higher":
        return f"above {margin}"
    return f"below {'-' * (one.margin > 0)}{margin}" if one.direction == "lower" else f"above {'-' * (one.margin > 0)}{margin}"
