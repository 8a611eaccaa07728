"""`python -m qat.report RUN_DIR ...`: one table of several runs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qat.errors import UsageError
from qat.report.numbers import bits_of
from qat.report.sweep_jobs import Group, Job
from qat.report.sweep_table import shown
from qat.utils.bounds import read_json

# What runs of one row have in common.
ALIKE = ("command", "model", "quant", "recipe", "data")
COLUMNS = {"recipe": "left", "bits": "left", "top-1 %": "right", "top-5 %": "right", "bytes": "right", "from": "left"}


def compare(run_dirs: Sequence[str]) -> Table:
    """One row for a run, or for all seeds of it: runs of one command, net, recipe and data whose directories have the same name.

    Args:
        run_dirs: directories that hold `results.json`.

    Raises:
        UsageError: a directory has no `results.json`, or it cannot be read.
    """
    groups: dict[str, list[Job]] = {}
    times: Counter[str] = Counter()
    for run_dir in run_dirs:
        path = Path(run_dir) / "results.json"
        try:
            job = Job(run_dir, {}, dict(read_json(path)), None)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path}: no results there ({error})") from error
        key = json.dumps([path.parent.name, *(job.results.get(name) for name in ALIKE)], sort_keys=True, default=str)
        seed = f"{key} {job.results.get('seed')}"  # the same one again is another run
        groups.setdefault(f"{key} {times[seed]}", []).append(job)
        times[seed] += 1
    out = Table(title="results")
    for name, justify in COLUMNS.items():
        out.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for jobs in groups.values():
        group = Group({}, jobs)
        scores = [shown(measure, group.statistic(measure)) for measure in ("top1", "top5", "size_bytes")]
        out.add_row(str(jobs[0].results.get("quant")), bits_of(jobs[0].results.get("recipe")) or "W32 A32", *scores, _origin(jobs))
    return out


def _origin(jobs: Sequence[Job]) -> str:
    """The file or run that a row comes from."""
    first = jobs[0]
    if len(jobs) > 1:
        return f"{Path(first.name).name} ({len(jobs)} seeds: {', '.join(str(job.results.get('seed')) for job in jobs)})"
    return str(first.results["weights"] if first.results.get("command") == "eval" else first.name)


def main(run_dirs: list[str]) -> int:
    """Show the table; gives the exit status."""
    if not run_dirs:
        Console(stderr=True).print("usage: python -m qat.report RUN_DIR ...")
        return 2
    try:
        Console().print(compare(run_dirs))
    except UsageError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
