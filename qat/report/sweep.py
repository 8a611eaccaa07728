"""The jobs below a directory: `sweep.csv`, one table with mean and spread over seeds, one page."""

from __future__ import annotations

import contextlib
import re
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat.analysis.analysis import PALETTE, panels
from qat.errors import UsageError
from qat.report.figures import WIDTH, is_measured, number, picture
from qat.report.page import FILE, Row, write_page
from qat.utils.files import csv_text, write_text
from qat.utils.text import MISSING, count, is_inside, json_object, one_line, read_file

# What is averaged over seeds: headings and formats.
MEASURES = {
    "top1": ("top-1 %", ".2f"),
    "top5": ("top-5 %", ".2f"),
    "loss": ("loss", ".4f"),
    "val_top1": ("val top-1 %", ".2f"),
    "size_bytes": ("bytes", ",.0f"),
    "wall_seconds": ("seconds", ",.1f"),
}
# Prefix of the columns with settings of the command line, and settings that make no job another experiment.
GIVEN, IGNORED = "overrides.", {"run_dir", "resume", "overwrite", "report"}
MOST_DRAWN = 40  # groups: names of more cannot be read


def gather(folder: Path) -> list[Row]:
    """A row for each job below a directory, nested ones too: what it was given, its error, what its `results.json` says."""
    begun = {path.parent for path in folder.rglob("results.json")} | {
        path.parents[1] for path in folder.rglob(".hydra/overrides.yaml")
    }
    rows = []
    for path in begun - {folder}:
        results = json_object(path / "results.json", path)
        error = results.get("error") if results else "no results.json: killed, or still going"
        status = "done" if not error else "failed" if results else "not finished"
        rows.append(
            {"job": str(path.relative_to(folder)), "status": status}
            | {
                GIVEN + key: value
                for key, value in overrides_of(path).items()
                if key not in IGNORED and not key.startswith("hydra.")
            }
            | {
                key: one_line(value) if isinstance(value, str) else value
                for key, value in results.items()
                if not isinstance(value, dict | list)
            }
            | {"error": one_line(" ".join(str(error or "").split()))}
        )
    # 2 comes before 10.
    return sorted(
        rows, key=lambda row: [part.zfill(9) for part in re.findall(r"\d+|\D+", row["job"])]
    )


def overrides_of(folder: Path) -> dict[str, str]:
    """What a job was given on the command line, by name; empty where it is not recorded.

    The run itself wrote the first file, once it had begun; Hydra writes the second at each start, also of a job that is refused there.
    """
    listed, path = (
        json_object(folder / "command.json", folder).get("overrides"),
        folder / ".hydra" / "overrides.yaml",
    )
    if listed is None and is_inside(path, folder):
        with contextlib.suppress(
            OSError, ValueError, RecursionError, yaml.YAMLError
        ):  # half a file, as a kill leaves it
            listed = yaml.safe_load(read_file(path))
    texts = listed if isinstance(listed, list) else []
    parts = (one_line(text).partition("=") for text in texts if isinstance(text, str))
    return {left.lstrip("+~"): _without_quotes(right) for left, _, right in parts}


def _without_quotes(value: str) -> str:
    """A value of the command line without the quotes around a text."""
    quoted = re.fullmatch(r"(['\"])(.*)\1", value)
    return re.sub(r"\\(['\"\\])", r"\1", quoted[2]) if quoted else value


def varied(jobs: Sequence[Row]) -> list[str]:
    """Names of the settings by which jobs differ, and the seed if it was given."""
    names = dict.fromkeys(
        name.removeprefix(GIVEN) for job in jobs for name in job if name.startswith(GIVEN)
    )
    return [
        name for name in names if name == "seed" or len({job.get(GIVEN + name) for job in jobs}) > 1
    ]


def given(job: Row, names: Sequence[str]) -> dict[str, str]:
    """Some settings of a job; a long number with four significant digits."""
    texts = {name: str(job.get(GIVEN + name, MISSING)) for name in names}
    return {
        name: text if len(text) < 9 or (value := number(text)) is None else f"{value:.4g}"
        for name, text in texts.items()
    }


def grouped(jobs: Sequence[Row]) -> list[tuple[dict[str, str], list[Row]]]:
    """Jobs that differ in nothing but their seed, together, with the settings by which they differ from others."""
    names = [name for name in varied(jobs) if name != "seed"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for job in jobs:
        # The checkpoint that a job starts from may have its seed in its name.
        texts = (
            re.sub(r"(seed[-_=]?)\d+", r"\1*", str(job.get(GIVEN + name, MISSING)))
            for name in names
        )
        groups.setdefault(tuple(texts), []).append(job)
    keys = [GIVEN + name for name in names]
    return [
        (given(dict(zip(keys, texts, strict=True)), names), group)
        for texts, group in groups.items()
    ]


def label(settings: Mapping[str, str]) -> str:
    """Settings in one line."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def values(jobs: Sequence[Row], measure: str) -> list[float]:
    """The known numbers of a measure, of the jobs that are done."""
    measured = [job.get(measure) for job in jobs if job["status"] == "done"]
    return [value for value in measured if is_measured(value)]


def mean(jobs: Sequence[Row], measure: str) -> str:
    """`97.22 ± 0.28`: mean and sample standard deviation (n - 1); the mean alone of one value, or of values that are the same."""
    known, spec = values(jobs, measure), MEASURES[measure][1]
    spread = f" ± {statistics.stdev(known):{spec}}" if len(set(known)) > 1 else ""
    return f"{statistics.fmean(known):{spec}}{spread}" if known else MISSING


def group_rows(jobs: Sequence[Row]) -> list[dict[str, str]]:
    """A row for each group: settings that differ, `n` = how many jobs are done, mean and spread of what was measured."""
    rows = []
    for settings, group in grouped(jobs):
        done = sum(job["status"] == "done" for job in group)
        rows.append(
            settings
            | {"n": str(done)}
            | {title: mean(group, one) for one, (title, _) in MEASURES.items() if values(jobs, one)}
        )
    return rows


def rich_table(rows: Sequence[Mapping[str, str]], title: str | None = None) -> Table:
    """Rows as a table for the terminal."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(
            name, justify="right" if name in dict(MEASURES.values()) else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def publish(folder: Path, *, report: bool, refused: Mapping[str, str] | None = None) -> None:
    """Write `sweep.csv` and the page of the jobs below a directory; show the table, then a line for each job that failed.

    Args:
        folder: of the sweep.
        report: write the page too.
        refused: errors of jobs that were not run because their directories hold results already, by name.

    Raises:
        UsageError: there are no runs below it.
    """
    jobs = gather(folder)
    if not jobs:
        raise UsageError(f"sweep={str(folder)!r}: must be a folder with runs below it")
    write_text(folder / "sweep.csv", csv_text(jobs))
    names, statuses = varied(jobs), Counter(job["status"] for job in jobs)
    counted = f"{count(len(jobs), 'job')}: {', '.join(f'{n} {status}' for status, n in sorted(statuses.items()))}"
    if report:
        context = {
            "kind": "sweep",
            "subject": f"over {', '.join(names)}" if names else folder.resolve().name,
            "counted": counted,
            "groups": group_rows(jobs),
            "pictures": [_figure(jobs)] if values(jobs, "top1") else [],
            "jobs": [
                {
                    "job": job["job"],
                    **given(job, names),
                    "top-1 %": job.get("top1"),
                    "error": job["error"],
                }
                for job in jobs
            ],
            "links": {
                job["job"]: f"{job['job']}/{FILE}"
                for job in jobs
                if (folder / job["job"] / FILE).is_file()
            },
        }
        write_page("sweep.html.j2", folder, context)
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(counted)
    console.print(rich_table(group_rows(jobs)))
    for job in jobs:
        if error := job["error"] or (refused or {}).get(job["job"]):
            console.print(f"job {job['job']} ({label(given(job, names))}): {error}", soft_wrap=True)
    console.print(f"in {folder}: sweep.csv{', report.html' if report else ''}", soft_wrap=True)


def _figure(jobs: Sequence[Row]) -> dict[str, str]:
    """Top-1 of every group with its spread, each job a dot."""
    groups = [
        (label(settings), group) for settings, group in grouped(jobs) if values(group, "top1")
    ][:MOST_DRAWN]
    drawn, (axis,) = panels(width=WIDTH, height=max(1.2, 0.6 + 0.28 * len(groups)))
    for y, (_, group) in enumerate(groups):
        known = values(group, "top1")
        spread = statistics.stdev(known) if len(known) > 1 else 0
        axis.errorbar(
            statistics.fmean(known),
            y,
            xerr=spread,
            fmt="o",
            color=PALETTE[0],
            markersize=5,
            capsize=3 if spread else 0,
        )
        axis.plot(known, [y] * len(known), ".", color=PALETTE[1], markersize=4)
    axis.set_yticks(range(len(groups)), [name[:44] for name, _ in groups])
    axis.margins(y=0.2)
    axis.invert_yaxis()
    said = "; ".join(f"{name}: {mean(group, 'top1')} %" for name, group in groups)
    return picture(
        "Top-1, %", f"{said}. Small: single jobs. Large: mean and sample standard deviation.", drawn
    )
