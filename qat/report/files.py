"""What a run has left in its directory, however far it got."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.utils.bounds import read_json

LOGS = ("train.log", "ptq.log", "analyze.log", "eval.log")
RESUMED = re.compile(r"resumed at step (\d+)")
ANALYSES = "analysis"  # folder of what training and calibration look at themselves


@dataclass(frozen=True)
class Origin:
    """How a run came about, as its task knows it.

    Attributes:
        config: all settings, plain data.
        config_text: the same as text.
        command: as it was typed, None where nobody knows.
        repeat: the command that gives the same run again, None where there is none.
        compared: what `differences` are to.
        differences: settings that are not the defaults: name, value, default.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    command: str | None = None
    repeat: str | None = None
    compared: str = ""
    differences: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Study:
    """What an analysis left: its index file and the folder of what that names."""

    folder: Path
    index: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the analysis."""
        return str(self.index["analysis"])

    def rows(self, file: str) -> list[dict[str, str]]:
        """Rows of one of its tables."""
        return read_csv(self.folder / file)


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read.

    Attributes:
        results: of `results.json`, empty where there is none.
        metrics: rows of `metrics.csv`.
        search: rows of `search.csv`.
        oscillation: rows of `oscillation.csv`.
        studies: what analyses left, those of the run itself first.
        resumed: the steps at which it was resumed.
        unread: files that are there and cannot be read.
    """

    folder: Path
    origin: Origin
    results: Mapping[str, Any]
    metrics: list[dict[str, str]]
    search: list[dict[str, str]]
    oscillation: list[dict[str, str]]
    studies: list[Study]
    resumed: list[int]
    unread: list[str]

    @property
    def command(self) -> str:
        """The command's name: train, ptq, analyze, eval."""
        return str(self.results.get("command") or self.origin.config.get("command") or "run")

    def study(self, name: str) -> Study | None:
        """That of an analysis, None where there is none."""
        return next((study for study in self.studies if study.name == name), None)


def read_run(folder: Path, origin: Origin) -> RunFiles:
    """Read what is there; a file that cannot be read is named, and missing otherwise."""
    unread: list[str] = []

    def attempt(read: Any, name: str, missing: Any) -> Any:
        try:
            return read(folder / name) if (folder / name).is_file() else missing
        except (OSError, ValueError, csv.Error):
            unread.append(name)
            return missing

    results = attempt(read_json, "results.json", {})
    return RunFiles(
        folder,
        origin,
        results if isinstance(results, dict) else {},
        attempt(read_csv, "metrics.csv", []),
        attempt(read_csv, "search.csv", []),
        attempt(read_csv, "oscillation.csv", []),
        [study for place in (folder, folder / ANALYSES) for study in _studies(place, unread)],
        _resumed(folder),
        unread,
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows by column name; a line that is being written is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row and None not in row.values()]


def _studies(folder: Path, unread: list[str]) -> list[Study]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            index = read_json(path)
        except (OSError, ValueError):
            unread.append(str(path.name))
            continue
        if isinstance(index, dict) and "analysis" in index and path.stem == index["analysis"]:
            found.append(Study(folder, index))
    return found


def _resumed(folder: Path) -> list[int]:
    texts = [path.read_text(encoding="utf-8", errors="replace") for name in LOGS if (path := folder / name).is_file()]
    return [int(step) for text in texts for step in RESUMED.findall(text)]
