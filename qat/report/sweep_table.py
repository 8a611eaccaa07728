"""A sweep on the terminal: a row for each group of jobs, and the jobs whose numbers do not count."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from qat.report.numbers import MISSING, number
from qat.report.sweep_jobs import GROUPS, JOBS, Group, Job, Statistic, Sweep

HEADINGS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "loss": "loss",
    "val_top1": "val top-1 %",
    "size_bytes": "bytes",
    "wall_seconds": "seconds",
}
FORMATS = {"loss": ".4f", "size_bytes": ",.0f", "wall_seconds": ",.1f"}
MOST_NAMED = 3  # groups that are as good
LONG = 9  # characters of a number from which it is shortened


def table(sweep: Sweep) -> Table:
    """Settings that differ, how many jobs count, and mean ± sample deviation of what was measured."""
    out = Table()
    rows = group_cells(sweep)
    for name in rows[0] if rows else ():
        out.add_column(name, justify="left" if name in sweep.varied else "right", overflow="fold")
    for row in rows:
        out.add_row(*map(Text, row.values()))
    return out


def group_cells(sweep: Sweep) -> list[dict[str, str]]:
    """The same as text by heading, a row for each group; `n` = how many jobs count, and of how many where some do not: `2 of 3`."""
    rows = []
    for group in sweep.groups:
        setting = {name: brief(group.setting.get(name, MISSING)) for name in sweep.varied}
        n, jobs = len(group.done), len(group.jobs)
        measured = {HEADINGS[measure]: shown(measure, group.statistic(measure)) for measure in sweep.measures}
        rows.append(setting | {"n": str(n) if n == jobs else f"{n} of {jobs}"} | measured)
    return rows


def shown(measure: str, found: Statistic | None) -> str:
    """`97.22 ± 0.28`; without a deviation where there is none, or where all values are equal sizes."""
    if found is None:
        return MISSING
    spec = FORMATS.get(measure, ".2f")
    has_deviation = found.std is not None and (found.std > 0 or measure != "size_bytes")
    return f"{found.mean:{spec}} ± {found.std:{spec}}" if has_deviation else f"{found.mean:{spec}}"


def closing_lines(sweep: Sweep, refused: Mapping[str, str]) -> list[str]:
    """Each job whose numbers do not count: where, what it was given, and why; the group that validation prefers; where the tables are.

    Args:
        sweep: all jobs.
        refused: why jobs were not run whose directories hold good results already.
    """
    lines = [f"{_named(sweep, job)}: {refused.get(job.name) or job.trouble}" for job in sweep.jobs if job.trouble or job.name in refused]
    if sweep.best is not None:
        lines.append(best_line(sweep, sweep.best))
    return [*lines, f"tables in {sweep.folder}: {JOBS}, {GROUPS}"]


def best_line(sweep: Sweep, group: Group) -> str:
    """The group that is highest on validation images, and how far that can be trusted: a spread over seeds needs two of them."""
    line = f"highest validation top-1: {label(group)} ({shown('val_top1', group.statistic('val_top1'))} %)"
    if any(len(one.values("val_top1")) == 1 for one in sweep.groups):
        return f"{line}; some have one seed: how much seeds change is not known"
    alike = [label(one) for one in sweep.alike(group)]
    more = f" and {len(alike) - MOST_NAMED} more" if len(alike) > MOST_NAMED else ""
    return f"{line}; within the spread over seeds of {', '.join(alike[:MOST_NAMED])}{more}: no winner" if alike else line


def label(group: Group) -> str:
    """Its setting in one line."""
    return " ".join(f"{key}={brief(value)}" for key, value in group.setting.items()) or "all jobs"


def brief(value: str) -> str:
    """A long number with four significant digits, anything else as it is."""
    found = number(value)
    return value if found is None or len(value) < LONG or not math.isfinite(found) else f"{found:.4g}"


def _named(sweep: Sweep, job: Job) -> str:
    """`job 3 (quant.bits=9 seed=1)`: what varies in the sweep, and the seed."""
    given = [f"{key}={brief(job.overrides[key])}" for key in dict.fromkeys([*sweep.varied, "seed"]) if key in job.overrides]
    return f"job {job.name}" + (f" ({' '.join(given)})" if given else "")
