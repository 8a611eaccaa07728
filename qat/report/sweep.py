"""Report the results of the jobs below a directory: `sweep.csv`, a table of means, and a page."""

from __future__ import annotations

import contextlib
import itertools
import re
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat.analysis.analysis import PALETTE, panels
from qat.errors import UsageError
from qat.report.figures import WIDTH, is_drawable, parse_number, picture
from qat.report.page import FILE, Row, write_page
from qat.utils.files import csv_text, write_text
from qat.utils.text import MISSING, format_count, is_inside, json_object, one_line, read_file

# Numbers that are averaged over seeds, with heading and format.
MEASURES = {
    "top1": ("top-1 %", ".2f"),
    "top5": ("top-5 %", ".2f"),
    "loss": ("mean loss", ".4f"),
    "val_top1": ("val top-1 %", ".2f"),
    "size_bytes": ("bytes", ",.0f"),
    "wall_seconds": ("seconds", ",.1f"),
}
# Prefix of the columns with settings of the command line.
SETTING_PREFIX = "overrides."
# Settings that do not change results, so rows leave them out.
IGNORED_SETTINGS = {"run_dir", "resume", "overwrite", "report"}
MAX_GROUPS = 40  # a figure with more groups would be illegible


def gather(folder: Path) -> list[Row]:
    """Read a row for each job at any depth below a directory: settings, results and error."""
    job_folders = {path.parent for path in folder.rglob("results.json")}
    job_folders |= {path.parents[1] for path in folder.rglob(".hydra/overrides.yaml")}
    job_folders.discard(folder)
    rows = [_job_row(path, str(path.relative_to(folder))) for path in job_folders]
    return sorted(rows, key=_natural_sort_key)


def _natural_sort_key(row: Row) -> list[str]:
    """Sort key that puts job 2 before job 10."""
    parts = re.findall(r"\d+|\D+", row["job"])
    return [part.zfill(9) if part.isdigit() else part for part in parts]


def _job_row(folder: Path, job: str) -> Row:
    results = json_object(folder / "results.json", folder)
    error: Any = "no results.json: killed, or still running"
    status = "not finished"
    if results:
        error = results.get("error")
        status = "failed" if error else "done"
    row: dict[str, Any] = {"job": job, "status": status}
    for name, value in overrides_of(folder).items():
        if name not in IGNORED_SETTINGS and not name.startswith("hydra."):
            row[SETTING_PREFIX + name] = value
    for name, value in results.items():
        if isinstance(value, str):
            row[name] = one_line(value)
        elif not isinstance(value, dict | list):
            row[name] = value
    row["error"] = one_line(" ".join(str(error or "").split()))
    return row


def overrides_of(folder: Path) -> dict[str, str]:
    """The settings on a job's command line, by name; empty if they were not recorded.

    The run itself writes `command.json`. Hydra writes its own file at each start, even for a job
    that is refused because results exist, so `command.json` is preferred.
    """
    overrides = json_object(folder / "command.json", folder).get("overrides")
    path = folder / ".hydra" / "overrides.yaml"
    if overrides is None and is_inside(path, folder):
        # The file is incomplete if the job was killed while writing it.
        with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
            overrides = yaml.safe_load(read_file(path))
    if not isinstance(overrides, list):
        return {}
    settings = {}
    for override in overrides:
        if isinstance(override, str):
            name, _, value = one_line(override).partition("=")
            settings[name.lstrip("+~")] = _without_quotes(value)
    return settings


def _without_quotes(value: str) -> str:
    """Remove quotes around a command-line value, and escapes inside them."""
    match = re.fullmatch(r"(['\"])(.*)\1", value)
    return re.sub(r"\\(['\"\\])", r"\1", match[2]) if match else value


def varied_settings(jobs: Sequence[Row]) -> list[str]:
    """Names of the settings that differ between jobs, and `seed` if any job sets it."""
    names = []
    for column in dict.fromkeys(itertools.chain.from_iterable(jobs)):
        if not column.startswith(SETTING_PREFIX):
            continue
        name = column.removeprefix(SETTING_PREFIX)
        if name == "seed" or len({job.get(column) for job in jobs}) > 1:
            names.append(name)
    return names


def job_settings(job: Row, names: Sequence[str]) -> dict[str, str]:
    """Values of these settings in a job, or `MISSING`; long numbers get four significant digits."""
    return {name: _shorten(str(job.get(SETTING_PREFIX + name, MISSING))) for name in names}


def _shorten(text: str) -> str:
    value = parse_number(text)
    if len(text) < 9 or value is None:
        return text
    return f"{value:.4g}"


def group_jobs(jobs: Sequence[Row]) -> list[tuple[dict[str, str], list[Row]]]:
    """Group jobs that differ only in their seed; list the settings that vary between groups."""
    names = [name for name in varied_settings(jobs) if name != "seed"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for job in jobs:
        texts = []
        seed = re.escape(str(job.get(SETTING_PREFIX + "seed", job.get("seed", MISSING))))
        for name in names:
            text = str(job.get(SETTING_PREFIX + name, MISSING))
            # The path of the checkpoint that a job starts from may contain the seed of the job.
            texts.append(re.sub(rf"(seed[-_=]?){seed}(?!\d)", r"\1*", text))
        groups.setdefault(tuple(texts), []).append(job)
    groups_with_settings = []
    for key, group in groups.items():
        settings = dict(zip(names, map(_shorten, key), strict=True))
        groups_with_settings.append((settings, group))
    return groups_with_settings


def join_settings(settings: Mapping[str, str]) -> str:
    """Join settings to one line of text."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def finished_values(jobs: Sequence[Row], measure: str) -> list[float]:
    """The values of a measure in finished jobs that have one."""
    numbers: list[float] = []
    for job in jobs:
        value = job.get(measure)
        if job["status"] == "done" and is_drawable(value):
            numbers.append(value)
    return numbers


def format_mean(jobs: Sequence[Row], measure: str) -> str:
    """`97.22 ± 0.28`: mean and sample standard deviation (n - 1).

    For a single value or equal values, only the mean; without values, `MISSING`.
    """
    numbers = finished_values(jobs, measure)
    if not numbers:
        return MISSING
    _, spec = MEASURES[measure]
    text = f"{statistics.fmean(numbers):{spec}}"
    if len(set(numbers)) > 1:
        text += f" ± {statistics.stdev(numbers):{spec}}"
    return text


def group_rows(jobs: Sequence[Row]) -> list[dict[str, str]]:
    """Make a row for each group: varied settings, number of finished jobs, means and deviations."""
    available_measures = [name for name in MEASURES if finished_values(jobs, name)]
    rows = []
    for settings, group in group_jobs(jobs):
        num_done = sum(job["status"] == "done" for job in group)
        row = settings | {"n": str(num_done)}
        for name in available_measures:
            heading, _ = MEASURES[name]
            row[heading] = format_mean(group, name)
        rows.append(row)
    return rows


def rich_table(rows: Sequence[Mapping[str, str]], title: str | None = None) -> Table:
    """Make a table for the terminal."""
    table = Table(title=title)
    numeric_headings = {heading for heading, _ in MEASURES.values()}
    for heading in rows[0]:
        justify = "right" if heading in numeric_headings else "left"
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def publish(folder: Path, *, report: bool, refused: Mapping[str, str] | None = None) -> None:
    """Write `sweep.csv` and the page of a sweep; print the table and a line for each error.

    Args:
        folder: directory of the sweep.
        report: True = also write the page.
        refused: error messages by job name, for jobs whose `results.json` has no error, such as
            jobs that did not run because their directories already contain results.

    Raises:
        UsageError: there are no runs below the folder.
    """
    jobs = gather(folder)
    if not jobs:
        raise UsageError(f"sweep={str(folder)!r}: must be a folder with runs below it")
    write_text(folder / "sweep.csv", csv_text(jobs))
    statuses = sorted(Counter(job["status"] for job in jobs).items())
    counts = ", ".join(f"{number} {status}" for status, number in statuses)
    summary = f"{format_count(len(jobs), 'job')}: {counts}"
    if report:
        _write_sweep_page(folder, jobs, summary)
    names = varied_settings(jobs)
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(summary)
    console.print(rich_table(group_rows(jobs)))
    for job in jobs:
        error = (refused or {}).get(job["job"]) or job["error"]
        if error:
            settings = join_settings(job_settings(job, names))
            console.print(f"job {job['job']} ({settings}): {error}", soft_wrap=True)
    files = "sweep.csv, report.html" if report else "sweep.csv"
    console.print(f"in {folder}: {files}", soft_wrap=True)


def _write_sweep_page(folder: Path, jobs: Sequence[Row], summary: str) -> None:
    names = varied_settings(jobs)
    rows = []
    links = {}
    for job in jobs:
        name = job["job"]
        scores = {"top-1 %": job.get("top1"), "error": job["error"]}
        rows.append({"job": name} | job_settings(job, names) | scores)
        if (folder / name / FILE).is_file():
            links[name] = quote(f"{name}/{FILE}")
    context = {
        "kind": "sweep",
        "subject": f"Comparison of {', '.join(names)}" if names else folder.resolve().name,
        "summary": summary,
        "groups": group_rows(jobs),
        "pictures": [_figure(jobs)] if finished_values(jobs, "top1") else [],
        "jobs": rows,
        "links": links,
    }
    write_page("sweep.html.j2", folder, context)


def _figure(jobs: Sequence[Row]) -> dict[str, str]:
    """Draw the mean top-1 of each group, its standard deviation, and a dot for each value.

    Only the first `MAX_GROUPS` groups with values are drawn.
    """
    groups = []
    for settings, group in group_jobs(jobs):
        if finished_values(group, "top1"):
            groups.append((join_settings(settings), group))
    groups = groups[:MAX_GROUPS]
    figure, (panel,) = panels(width=WIDTH, height=max(1.2, 0.6 + 0.28 * len(groups)))
    for y, (_, group) in enumerate(groups):
        top1 = finished_values(group, "top1")
        deviation = statistics.stdev(top1) if len(top1) > 1 else 0
        panel.errorbar(
            statistics.fmean(top1),
            y,
            xerr=deviation,
            fmt="o",
            color=PALETTE[0],
            markersize=5,
            capsize=3 if deviation else 0,
        )
        panel.plot(top1, [y] * len(top1), ".", color=PALETTE[1], markersize=4)
    panel.set_yticks(range(len(groups)), [name[:44] for name, _ in groups])
    panel.margins(y=0.2)
    panel.invert_yaxis()
    means = "; ".join(f"{name}: {format_mean(group, 'top1')} %" for name, group in groups)
    description = f"{means}. Small dots: jobs. Large dots: mean ± sample standard deviation."
    return picture("Top-1, %", description, figure)
