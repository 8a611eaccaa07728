"""`python -m qat.report RUN_DIR ...`: one table of several runs."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from qat.report.figures import bits_of
from qat.report.sweep import GIVEN, MEASURES, grouped, mean, rich_table, values
from qat.utils.text import json_object


def main(run_dirs: list[str]) -> int:
    """Show a row for each run, or for all seeds of it: runs of one command, model, recipe and data in directories of the same name."""
    runs = []
    for run_dir in run_dirs:
        results = json_object(Path(run_dir) / "results.json")
        if not results:
            sys.stderr.write(
                f"error: {run_dir}: must be the directory of a run; there is no results.json\n"
            )
            return 1
        settings = {
            "run": Path(run_dir).name,
            **{name: str(results.get(name)) for name in ("command", "model", "recipe", "data")},
        }
        runs.append(
            results
            | {"status": "done", "from": run_dir}
            | {GIVEN + name: value for name, value in settings.items()}
        )
    rows, shown = [], [one for one in ("top1", "top5", "size_bytes") if values(runs, one)]
    for _, group in grouped(runs):
        what = {
            "recipe": str(group[0].get("quant")),
            "bits": bits_of(group[0].get("recipe")) or "W32 A32",
        }
        rows.append({
            **what,
            **{MEASURES[one][0]: mean(group, one) for one in shown},
            "from": " ".join(run["from"] for run in group),
        })
    Console().print(rich_table(rows, "results"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["."]))
