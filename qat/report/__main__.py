"""`python -m qat.report [RUN_DIR ...]`: print a table of runs; by default, of directory `.`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from qat.report.figures import bits_of
from qat.report.sweep import (
    MEASURES,
    SETTING_PREFIX,
    finished_values,
    format_mean,
    group_jobs,
    rich_table,
)
from qat.utils.text import json_object


def main(run_dirs: list[str]) -> int:
    """Print a row for each run, or one row for all seeds of a run.

    Runs that have the same command, model, recipe, data and directory name, except for a number
    after `seed`, count as seeds of one run.

    Returns:
        The exit code: 1 if a directory is not a run directory, else 0.
    """
    runs = []
    for run_dir in run_dirs:
        results = json_object(Path(run_dir) / "results.json")
        if not results:
            sys.stderr.write(
                f"error: {run_dir}: must be the directory of a run; there is no results.json\n"
            )
            return 1
        runs.append(_row(run_dir, results))
    measures = [name for name in ("top1", "top5", "size_bytes") if finished_values(runs, name)]
    rows = []
    for _, group in group_jobs(runs):
        bits = bits_of(group[0].get("recipe")) or "W32 A32"
        if all(run["status"] == "failed" for run in group):
            bits = "failed"
        row = {"recipe": str(group[0].get("quant")), "bits": bits}
        for name in measures:
            heading, _ = MEASURES[name]
            row[heading] = format_mean(group, name)
        row["from"] = " ".join(run["from"] for run in group)
        rows.append(row)
    Console().print(rich_table(rows, "results"))
    return 0


def _row(run_dir: str, results: dict[str, Any]) -> dict[str, Any]:
    """Results of a run, with the settings by which runs are grouped."""
    row = results | {"from": run_dir, f"{SETTING_PREFIX}run": Path(run_dir).name}
    row["status"] = "failed" if results.get("error") else "done"
    for name in ("command", "model", "recipe", "data"):
        row[SETTING_PREFIX + name] = str(results.get(name))
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["."]))
