"""Gather `results.json` of several runs into one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qat.errors import UsageError


def collect(run_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The results of each run directory, with `run_dir` added.

    Raises:
        UsageError: a directory has no `results.json`, or it cannot be read.
    """
    found = []
    for run_dir in run_dirs:
        path = Path(run_dir) / "results.json"
        try:
            found.append({"run_dir": str(run_dir), **json.loads(path.read_text(encoding="utf-8"))})
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{path}: no results there ({error})") from error
    return found


def _bits(recipe: dict[str, Any] | None) -> str:
    return "W32 A32" if not recipe or recipe["name"] == "fp" else f"W{recipe['bits']} A{recipe['act_bits']}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row a run: recipe, bits, accuracy, size as stored at that width, and the file or run it comes from."""
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
    for row in results:
        origin = row["weights"] if row.get("command") == "eval" else row["run_dir"]
        size = "-" if row.get("size_bytes") is None else f"{row['size_bytes']:,}"
        out.add_row(str(row["quant"]), _bits(row.get("recipe")), _percent(row["top1"]), _percent(row["top5"]), size, str(origin))
    return out
