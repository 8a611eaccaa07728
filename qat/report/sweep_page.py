"""`report.html` of a sweep: the table of its groups, a drawing of their accuracies, every job."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qat.report.curves import FIRST, SECOND, Curve, draw
from qat.report.notes import Note, grouped
from qat.report.numbers import number
from qat.report.page import FILE, render
from qat.report.run_files import Row
from qat.report.sweep_jobs import GROUPS, JOBS, Group, Job, Sweep
from qat.report.sweep_table import HEADINGS, best_line, brief, group_cells, label, shown
from qat.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DRAWN = 40  # groups: names of more cannot be read
LOGARITHMIC = 20  # ratio of the largest to the smallest value of a setting from which its axis is logarithmic
MEASURE = "top1"


def write_sweep_report(sweep: Sweep) -> Path:
    """Write the page of a sweep into its directory, whole or not at all; gives the file."""
    path = sweep.folder / FILE
    write_text(path, sweep_page(sweep))
    return path


def sweep_page(sweep: Sweep) -> str:
    """The text of the page."""
    cells = group_cells(sweep)
    given = sweep.jobs[0].setting if sweep.jobs else {}
    context = {
        "sweep": sweep,
        "name": sweep.folder.resolve().name,
        "best": best_line(sweep, sweep.best) if sweep.best else "",
        "notes": grouped([_note(job) for job in sweep.troubled]),
        "groups": cells if sweep.varied else [{"jobs": "all jobs"} | row for row in cells],
        "curve": drawing(sweep),
        "jobs": [_job_cells(sweep, job) for job in sweep.jobs],
        "links": {job.name: f"{job.name}/{FILE}" for job in sweep.jobs if (sweep.folder / job.name / FILE).is_file()},
        "files": (JOBS, GROUPS),
        "command": sweep.command and shlex.join(["python", *sweep.command]),
        "common": [(key, value) for key, value in given.items() if key not in sweep.varied],
    }
    return render("sweep.html.j2", sweep.folder, context)


def _note(job: Job) -> Note:
    if job.results.get("error"):
        return Note("error", job.name, str(job.trouble), "It counts in no mean. Its log has more.")
    advice = "The same command with resume=auto goes on where it was; python analyze.py sweep=DIR makes this page anew."
    return Note("warning", job.name, str(job.trouble), advice)


def _job_cells(sweep: Sweep, job: Job) -> Row:
    setting = {key: brief(job.overrides.get(key, "")) for key in sweep.varied if key != "command"}
    scores = {HEADINGS[measure]: job.results.get(measure) for measure in sweep.measures}
    return {"job": job.name, **setting, "seed": job.results.get("seed", job.overrides.get("seed", "")), "status": job.status, **scores}


def drawing(sweep: Sweep) -> Curve | None:
    """Top-1 of every group, each job a dot; over the setting itself where there is only one and it is a number."""
    groups = [group for group in sweep.groups if group.values(MEASURE)]
    places = _numeric(sweep, groups)
    if len(groups) < 2 or (places is None and len(groups) > MOST_DRAWN):
        return None
    said = [f"{label(group)}: {shown(MEASURE, group.statistic(MEASURE))} % (n = {len(group.values(MEASURE))})" for group in groups]
    words = f"{'; '.join(said[:MOST_DRAWN])}. Small: single jobs. Large: mean and sample standard deviation."

    def over_numbers(axes: Axes) -> None:
        _dots(axes, groups, places or [], is_upright=True)
        if min(places or []) > 0 and max(places or []) / min(places or []) > LOGARITHMIC:
            axes.set_xscale("log")
        axes.set(xlabel=sweep.varied[0], ylabel="top-1, %")

    def one_below_another(axes: Axes) -> None:
        _dots(axes, groups, range(len(groups)), is_upright=False)
        axes.set_yticks(range(len(groups)), [label(group)[:44] for group in groups])
        axes.margins(y=0.2)
        axes.invert_yaxis()
        axes.set_xlabel("top-1, %")

    if places:
        return draw("sweep", "Top-1, %", words, over_numbers)
    return draw("sweep", "Top-1, %", words, one_below_another, height=max(1.2, 0.6 + 0.28 * len(groups)))


def _dots(axes: Axes, groups: Sequence[Group], places: Sequence[float], *, is_upright: bool) -> None:
    """Single jobs small; mean and deviation large."""
    for place, group in zip(places, groups, strict=True):
        values, found = group.values(MEASURE), group.statistic(MEASURE)
        among = [place] * len(values)
        mean, std = (found.mean, found.std or 0) if found else (math.nan, 0)
        x, y = (among, values) if is_upright else (values, among)
        axes.plot(x, y, ".", color=SECOND, markersize=4, zorder=2)
        (x_mean, y_mean), (x_std, y_std) = ((place, mean), (0, std)) if is_upright else ((mean, place), (std, 0))
        axes.errorbar(x_mean, y_mean, y_std, x_std, fmt="o", color=FIRST, markersize=5, capsize=3 if std else 0, linewidth=1.4, zorder=1)


def _numeric(sweep: Sweep, groups: Sequence[Group]) -> list[float] | None:
    """Values of the one setting that differs, if they are numbers, and enough of them for an axis."""
    if len(sweep.varied) != 1 or len(groups) < 4:
        return None
    values = [number(group.setting.get(sweep.varied[0])) for group in groups]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return known if len(known) == len(groups) else None
