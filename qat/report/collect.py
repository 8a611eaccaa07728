"""Gather `results.json` of several runs into one table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qat.errors import UsageError
from qat.utils.bounds import read_json


def collect(run_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The results of each run directory, with `run_dir` added.

    Raises:
        UsageError: a directory has no `results.json`, or it cannot be read.
    """
    found = []
    for run_dir in run_dirs:
        path = Path(run_dir) / "results.json"
        try:
            found.append({"run_dir": str(run_dir), **read_json(path)})
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path}: no results there ({error})") from error
    return found


def _bits(recipe: dict[str, Any] | None) -> str:
    return "W32 A32" if not recipe or recipe["name"] == "fp" else f"W{recipe['bits']} A{recipe['act_bits']}"


def _percent(values: Sequence[float | None]) -> str:
    """One value, or mean and sample deviation of several; a dash where there is none."""
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return f"{known[0]:.2f}" if known else "-"
    return f"{statistics.mean(known):.2f} ± {statistics.stdev(known):.2f}"


def _origin(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    if len(rows) > 1:
        return f"{Path(first['run_dir']).name} ({len(rows)} seeds: {', '.join(str(r['seed']) for r in rows)})"
    return str(first["weights"] if first.get("command") == "eval" else first["run_dir"])


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row a run, or a row for all seeds of it: runs of one recipe whose directories have the same name.

    Columns: recipe, bits, accuracy in percent, size as stored at that width, and the file or run it comes from.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((Path(result["run_dir"]).name, str(result["quant"])), []).append(result)
    out = Table(title="results")
    for name, justify in (
        ("recipe", "left"),
        ("bits", "left"),
        ("top-1 %", "right"),
        ("top-5 %", "right"),
        ("bytes", "right"),
        ("from", "left"),
    ):
        out.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (_, quant), rows in groups.items():
        size = rows[0].get("size_bytes")
        scores = [_percent([row[key] for row in rows]) for key in ("top1", "top5")]
        out.add_row(quant, _bits(rows[0].get("recipe")), *scores, "-" if size is None else f"{size:,}", _origin(rows))
    return out
