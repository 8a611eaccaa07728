"""Rows as JSON lines, written as they come; a command that is run again goes on behind them."""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def failure(error: BaseException) -> Row:
    """Why there is no number: the error in one line, and where it came from."""
    text = " ".join(str(error).split())[:300]
    return {"failed": f"{type(error).__name__}: {text}", "trace": "".join(traceback.format_exception(error))[-1500:]}


def append(path: Path, row: Row) -> None:
    """Add a line; several processes may do so at a time."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All whole lines; one that was cut short is none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def begin(path: Path) -> list[Row]:
    """What is there already; a line that was cut short is ended, so that the next one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")
    return read(path)


class Records:
    """Measurements by name. One that failed is there too: its reason is the answer.

    Args:
        path: JSON lines.
        seconds: from now on in which measurements may start.

    Attributes:
        rows: what is there, by name.
        left: names for which there was no time.
        until: when the time is over, by `time.monotonic`.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.rows = {row["name"]: row for row in begin(path) if "name" in row}
        self.left: list[str] = []
        self.until = time.monotonic() + seconds

    def add(self, name: str, row: Row) -> None:
        """Write a row, and say on the screen that it is there."""
        self.rows[name] = {"name": name, **row}
        append(self.path, self.rows[name])
        print(f"{name}: {row.get('failed', 'done')}", flush=True)

    def wants(self, name: str, *, needs: float = 0) -> bool:
        """True if there is no row of this name and time to measure one; remembers what there was no time for.

        Args:
            name: of the row.
            needs: seconds.
        """
        if name in self.rows:
            return False
        if time.monotonic() + needs > self.until:
            self.left.append(name)
            return False
        return True


def commit() -> str:
    """The commit of the working tree, if it is known."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
