"""What a run has left in its directory, however far it got."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.report.numbers import number
from qat.utils.bounds import read_json
from qat.utils.files import csv_rows

LOGS = ("train.log", "ptq.log", "analyze.log", "eval.log", "export.log")
RESUMED = re.compile(r"resumed at step (\d+)")
ANALYSES = "analysis"  # folder of the analyses that training and calibration make of their own net

Row = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """How a run came about, as its task knows it.

    Attributes:
        config: all settings, plain data.
        config_text: the text of `config.yaml`.
        command: as it was typed, None where nobody knows.
        repeat: the command that gives the same run again, None where there is none.
        compared: what `differences` are to.
        differences: settings that are not the defaults: `setting`, `here`, `default`.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    command: str | None = None
    repeat: str | None = None
    compared: str = ""
    differences: Sequence[Row] = ()


@dataclass(frozen=True)
class AnalysisFiles:
    """What an analysis left: its index file, and the folder of the tables and pictures that it names."""

    folder: Path
    index: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the analysis."""
        return str(self.index["analysis"])

    def rows(self, file: str) -> list[Row] | None:
        """Rows of one of its tables, None where it cannot be read."""
        try:
            return read_csv(self.folder / Path(file).name)
        except (OSError, ValueError, csv.Error):
            return None


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read.

    Attributes:
        results: of `results.json`, empty where there is none.
        metrics: rows of `metrics.csv`.
        search: rows of `search.csv`.
        oscillation: rows of `oscillation.csv`.
        analyses: those of the run itself first.
        resumed: the steps at which it was resumed.
        unread: files that are there and cannot be read.
    """

    folder: Path
    origin: Origin
    results: Mapping[str, Any]
    metrics: list[Row]
    search: list[Row]
    oscillation: list[Row]
    analyses: list[AnalysisFiles]
    resumed: list[int]
    unread: list[str]

    @property
    def command(self) -> str:
        """The command's name: train, ptq, analyze, eval, export."""
        return str(self.results.get("command") or self.origin.config.get("command") or "run")

    @property
    def subject(self) -> str:
        """Model, recipe and data, or the directory's name where nobody knows them."""
        model = self.results.get("model") or (self.origin.config.get("model") or {}).get("name")
        named = [model, self.results.get("quant"), self.results.get("data")]
        return " · ".join(str(name) for name in named if name) or self.folder.name

    def analysis(self, name: str) -> AnalysisFiles | None:
        """That of a name, None where there is none."""
        return next((one for one in self.analyses if one.name == name), None)


def read_run(folder: Path, origin: Origin) -> RunFiles:
    """Read what is there; a file that cannot be read is named, and missing otherwise."""
    unread: list[str] = []

    def attempt(path: Path, missing: Any) -> Any:
        try:
            return read_json(path) if path.suffix == ".json" else read_csv(path)
        except FileNotFoundError:
            return missing
        except (OSError, ValueError, csv.Error):
            unread.append(path.name)
            return missing

    results = attempt(folder / "results.json", {})
    paths = [path for place in (folder, folder / ANALYSES) for path in sorted(place.glob("*.json"))]
    indices = [(path, attempt(path, None)) for path in paths]
    logs = [path.read_text(encoding="utf-8", errors="replace") for name in LOGS if (path := folder / name).is_file()]
    return RunFiles(
        folder=folder,
        origin=origin,
        results=results if isinstance(results, dict) else {},
        **{name: attempt(folder / f"{name}.csv", []) for name in ("metrics", "search", "oscillation")},
        analyses=[AnalysisFiles(path.parent, one) for path, one in indices if isinstance(one, dict) and one.get("analysis") == path.stem],
        resumed=[int(step) for text in logs for step in RESUMED.findall(text)],
        unread=list(dict.fromkeys(unread)),
    )


def read_csv(path: Path) -> list[Row]:
    """Rows by column name, what is a number as such; a line that is being written is left out."""
    whole = [row for row in csv_rows(path) if None not in row and None not in row.values()]
    return [{name: text if (value := number(text)) is None else value for name, text in row.items()} for row in whole]
