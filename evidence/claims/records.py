"""The outcome of every run: a line of JSON in `evidence/records/CLAIM.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from qat.errors import UsageError
from qat.utils.files import json_text, write_text

# Of fewer epochs a sixth would be one.
SHORTEST = 12


@dataclass(frozen=True)
class Record:
    """One run. A metric or a height in a map that is not finite is None, and counts as not measured.

    Attributes:
        claim: id of the claim.
        arm: name in its file.
        seed: of the run.
        command: the one that trains or quantizes.
        further_commands: those after it, by name.
        starts: arms whose kept weights it began from or was taught by, with their digests.
        metrics: name to value, as measured.
        curves: name to points, `[[x, y], ...]`.
        maps: name to `{"x": [...], "y": [...], "z": [[...]]}`, z[y][x].
        wall_seconds: None where no clock ran.
        machine: processor, cores, threads.
        device: where the tensors were.
        versions: of libraries; None where one is not installed.
        git_commit: of this repository, None outside of one.
        date: of the run, year-month-day.
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

    @property
    def processor(self) -> str:
        """Type of the CPU."""
        return self.machine.partition(",")[0]

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics, and `val_end`: the mean of validation top-1 over the last sixth of at least twelve epochs.

        At two bits it moves by half a point from one epoch to the next, and `val_top1` is that of the best.
        """
        epochs = [height for _, height in self.curves.get("val_top1", [])]
        last = [height for height in epochs[-(len(epochs) // 6) :] if height is not None]
        return {
            **self.metrics,
            **({"val_end": statistics.mean(last)} if len(epochs) >= SHORTEST and last else {}),
        }


def read_records(folder: Path) -> list[Record]:
    """All records in a folder, ordered by claim, arm and seed; none where there is no folder.

    Raises:
        UsageError: a line is no record.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(Record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UsageError(f"{path}, line {number}: must be a record ({error})") from error
    return sorted(found, key=_key)


def _key(record: Record) -> tuple[str, str, int]:
    return record.claim, record.arm, record.seed


def add_record(folder: Path, record: Record) -> None:
    """Put a record into its claim's file, in place of one of the same arm and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.claim}.jsonl"
    with FileLock(f"{path}.lock"):
        kept = [
            one
            for one in read_records(folder)
            if one.claim == record.claim and _key(one) != _key(record)
        ]
        plain = [
            json.loads(json_text(dataclasses.asdict(one)))
            for one in sorted([*kept, record], key=_key)
        ]  # null for NaN
        write_text(path, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in plain))
