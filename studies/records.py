"""The outcome of one run of one arm: `results/<ID>/<arm>-seed<N>.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import UsageError
from qat.utils.files import write_text
from studies.claims import mapped

# Of fewer epochs a sixth would be one.
SHORTEST = 12


@dataclass(frozen=True)
class Record:
    """One run. A metric or a height in a map that is no number is None, and counts as not measured.

    Attributes:
        claim: id of the claim.
        arm: name in its file.
        seed: of the run.
        command: the one that trains or quantizes.
        further_commands: those behind it, by name.
        starts: arms whose kept weights it began from or was taught by, with their digests.
        metrics: name to value, as measured.
        curves: name to points, `[[x, y], ...]`.
        maps: name to `{"x": [...], "y": [...], "z": [[...]]}`, z[y][x].
        wall_seconds: None where nobody looked at a clock.
        machine: processor, cores, threads.
        device: where the tensors were.
        versions: of libraries; None where one is not installed.
        git_commit: of this repository, None outside of one.
        date: of the run, year-month-day.
        format: 1 = `quant.steps` was absolute where the command does not say, but for `seq`; 2 = relative.
    """

    claim: str
    arm: str
    seed: int
    command: str
    further_commands: Mapping[str, str]
    starts: Mapping[str, str]
    metrics: Mapping[str, float | None]
    curves: Mapping[str, list[list[float | None]]]
    maps: Mapping[str, Mapping[str, list[Any]]]
    wall_seconds: float | None
    machine: str
    device: str
    versions: Mapping[str, str | None]
    git_commit: str | None
    date: str
    format: int = 1

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics, and `val_end`: the mean of validation top-1 over the last sixth of at least twelve epochs.

        At two bits it moves by half a point from one epoch to the next, and `val_top1` is that of the best.
        """
        epochs = [height for _, height in self.curves.get("val_top1", [])]
        last = [height for height in epochs[-(len(epochs) // 6) :] if height is not None]
        return {**self.metrics, **({"val_end": statistics.mean(last)} if len(epochs) >= SHORTEST and last else {})}

    @property
    def place(self) -> str:
        """Where it is below the folder of results."""
        return f"{self.claim}/{self.arm}-seed{self.seed}.json"


def read_record(path: Path) -> Record:
    """One file.

    Raises:
        UsageError: one line that names the file and what it must be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: must be JSON ({error})") from error
    record = mapped(Record, content, f"{path}: content")
    if path.parts[-2:] != tuple(record.place.split("/")):
        raise UsageError(f"{path}: its claim, arm and seed say {record.place}; must be what the file is called")
    return record


def read_records(folder: Path) -> list[Record]:
    """All records below a folder, ordered by claim, arm and seed; none where there is no folder.

    Raises:
        UsageError: one of them is not as it should be.
    """
    return sorted((read_record(path) for path in folder.rglob("*.json")), key=lambda record: (record.claim, record.arm, record.seed))


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole or not at all, a line for every metric, curve, map and command. Infinite and NaN become null."""
    lines = [f"  {json.dumps(name)}: {_shown(value)}" for name, value in _finite(dataclasses.asdict(record)).items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _shown(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(one, ensure_ascii=False)}" for key, one in value.items()) + "\n  }"


def _finite(value: Any) -> Any:
    """The same with None in place of what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
