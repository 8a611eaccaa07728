"""`report.html` of a sweep: the table of its groups, a drawing of their accuracies, every job."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qat.report.curves import STYLE
from qat.report.html import Html, element, joined
from qat.report.notes import Note, notes_section
from qat.report.numbers import number
from qat.report.page import FILE, document
from qat.report.svg import SERIES, inline
from qat.report.sweep import GROUPS, JOBS, Group, Job, Sweep
from qat.report.sweep_table import HEADINGS, MISSING, best_line, brief, label, number_of_jobs, shown
from qat.report.tables import long_table, table
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
    notes = [Note("error" if job.results.get("error") else "warning", job.name, str(job.trouble), _advice(job)) for job in sweep.troubled]
    parts = [
        ("notes", "Worth knowing", notes_section(notes) if notes else None),
        ("results", "Results", joined(part for part in (_groups(sweep), drawing(sweep)) if part)),
        ("jobs", "Jobs", long_table("Every job", [_job_row(sweep, job) for job in sweep.jobs], JOBS)),
        ("run", "How it was run", _origin(sweep)),
    ]
    lead = f"{sweep.counted}. {best_line(sweep.best)[:1].upper() + best_line(sweep.best)[1:]}." if sweep.best else f"{sweep.counted}."
    kept = [(ident, name, content) for ident, name, content in parts if content]
    return document("Sweep", sweep.folder.resolve().name, lead, kept, str(sweep.folder))


def _advice(job: Job) -> str:
    if job.results.get("error"):
        return "It counts in no mean. Its log has more."
    return "The same command with resume=auto goes on where it was; python analyze.py sweep=DIR makes this page anew."


def _groups(sweep: Sweep) -> Html:
    rows: list[dict[str, object]] = []
    for i, group in enumerate(sweep.groups):
        setting = {name: joined([brief(group.setting[name])]) if name in group.setting else "" for name in sweep.varied}
        first = {} if sweep.varied else {"jobs": f"group {i + 1}"}
        scores = {HEADINGS[measure]: joined([shown(measure, group.statistic(measure))]) for measure in sweep.measures}
        rows.append({**first, **setting, "n": number_of_jobs(group), **scores})
    caption = "Mean ± sample standard deviation over the jobs that differ in their seed alone; n of them count"
    files = element("p", f"As tables: {GROUPS}, and every job with all its keys in {JOBS}.", class_="hint")
    return joined([table(caption, rows, sortable=True), files])


def _job_row(sweep: Sweep, job: Job) -> dict[str, object]:
    page = f"{job.name}/{FILE}"
    name = element("a", job.name, href=page) if (sweep.folder / page).is_file() else Html(element("span", job.name))
    setting = {key: joined([brief(job.overrides.get(key, ""))]) for key in sweep.varied if key != "command"}
    scores = {HEADINGS[m]: MISSING if job.results.get(m) is None else job.results[m] for m in sweep.measures}
    status = "done" if job.trouble is None else "failed" if job.results.get("error") else "not finished"
    return {"job": name, **setting, "seed": job.results.get("seed", job.overrides.get("seed", "")), "status": status, **scores}


def _origin(sweep: Sweep) -> Html:
    parts = []
    if sweep.command:
        title, code = "As it was typed", element("code", shlex.join(["python", *sweep.command]))
        parts += [element("h3", title), element("pre", code, class_="command", tabindex="0", role="region", aria_label=title)]
    facts: list[dict[str, object]] = [{"what": "directory", "value": element("code", str(sweep.folder))}]
    facts.append({"what": "jobs", "value": len(sweep.jobs)})
    parts.append(table("The sweep", facts))
    common = {key: value for job in sweep.jobs[:1] for key, value in job.setting.items() if key not in sweep.varied}
    if common:
        given = [{"setting": key, "value": element("code", value)} for key, value in common.items()]
        parts.append(table("What all jobs were given", given))
    return joined(parts)


def drawing(sweep: Sweep) -> Html | None:
    """Top-1 of every group, each job a dot; over the setting itself where there is only one and it is a number."""
    groups = [group for group in sweep.groups if group.values(MEASURE)]
    if len(groups) < 2:
        return None
    over = _numeric(sweep, groups)
    if over is None and len(groups) > MOST_DRAWN:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    words = _in_words(groups)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5 if over else max(1.2, 0.6 + 0.28 * len(groups))), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        if over:
            _over_numbers(axes, groups, over, sweep.varied[0])
        else:
            _one_below_another(axes, groups)
        drawn = inline(figure, "sweep", "Top-1, %", words)
    caption = "Small: single jobs. Large: their mean, with the sample standard deviation where there are several"
    return element(
        "div",
        element("figure", drawn, element("figcaption", element("strong", "Top-1, %"), element("span", caption)), class_="plot"),
        class_="plots",
    )


def _numeric(sweep: Sweep, groups: Sequence[Group]) -> list[float] | None:
    """Values of the one setting that differs, if they are numbers, and enough of them for an axis."""
    if len(sweep.varied) != 1 or len(groups) < 4:
        return None
    values = [number(group.setting.get(sweep.varied[0])) for group in groups]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return known if len(known) == len(groups) else None


def _over_numbers(axes: Axes, groups: Sequence[Group], places: Sequence[float], name: str) -> None:
    for place, group in sorted(zip(places, groups, strict=True), key=lambda pair: pair[0]):
        found = group.statistic(MEASURE)
        values = group.values(MEASURE)
        axes.plot([place] * len(values), values, ".", color=SERIES[1], markersize=4, zorder=2)
        if found:
            axes.errorbar(place, found.mean, yerr=found.std, fmt="o", color=SERIES[0], markersize=5, capsize=3, linewidth=1.4, zorder=1)
    if min(places) > 0 and max(places) / min(places) > LOGARITHMIC:
        axes.set_xscale("log")
    axes.set_xlabel(name)
    axes.set_ylabel("top-1, %")
    axes.grid(axis="y", linewidth=0.6, alpha=0.6)


def _one_below_another(axes: Axes, groups: Sequence[Group]) -> None:
    for row, group in enumerate(groups):
        found = group.statistic(MEASURE)
        values = group.values(MEASURE)
        axes.plot(values, [row] * len(values), ".", color=SERIES[1], markersize=4, zorder=2)
        if found:
            axes.errorbar(found.mean, row, xerr=found.std, fmt="o", color=SERIES[0], markersize=5, capsize=3, linewidth=1.4, zorder=1)
    axes.set_yticks(range(len(groups)), [label(group)[:44] for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("top-1, %")
    axes.grid(axis="x", linewidth=0.6, alpha=0.6)


def _in_words(groups: Sequence[Group]) -> str:
    said = [f"{label(group)}: {shown(MEASURE, group.statistic(MEASURE))} % (n = {len(group.values(MEASURE))})" for group in groups]
    return "; ".join(said[:MOST_DRAWN]) + "."
