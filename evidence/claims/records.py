"""Records of runs, each a line of JSON in `evidence/records/CLAIM.jsonl`."""

from __future__ import annotations

import base64
import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from qat.errors import UsageError
from qat.utils.files import json_text, write_text

# The fewest epochs for `val_end`; a sixth of fewer would be a single epoch.
SHORTEST = 12


@dataclass(frozen=True)
class Record:
    """Results of a run. A non-finite value is stored as None, and counts as not measured.

    Attributes:
        claim: id of the claim.
        arm: name of the arm in the claim's file.
        seed: seed of the run.
        command: the command that trains or quantizes.
        further_commands: the commands that follow, by name.
        starts: arms whose stored weights were the start or the teacher of the run, with their
            digests; empty in records since 2026-11-27.
        metrics: name to value, as measured.
        curves: name to points, `[[x, y], ...]`.
        maps: name to `{"x": [...], "y": [...], "z": [[...]]}`, z[y][x].
        wall_seconds: duration; None if it was not measured.
        machine: processor, cores, threads. Records until 2026-11-28 contain only the name of the
            processor, which several types share.
        device: device of the tensors.
        versions: versions of libraries; None for a library that is not installed.
        git_commit: commit of this repository; None outside a repository.
        date: day of the run, year-month-day.
        correct: which test images are classified correctly, see
            `qat.tasks.results.correct_field`; None if this was not stored, as in records until
            2026-11-28.
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
    correct: str | None = None

    @property
    def processor(self) -> str:
        """Type of the CPU."""
        return self.machine.partition(",")[0]

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics, and `val_end`: mean validation top-1 of the last sixth of 12 or more epochs.

        `val_top1` is the value of the best epoch, but with 2 bits, top-1 changes by half a point
        between epochs.
        """
        epochs = [top1 for _, top1 in self.curves.get("val_top1", [])]
        last = [top1 for top1 in epochs[-(len(epochs) // 6) :] if top1 is not None]
        values = dict(self.metrics)
        if len(epochs) >= SHORTEST and last:
            values["val_end"] = statistics.mean(last)
        return values

    @property
    def hits(self) -> list[int]:
        """1 for each test image that is classified correctly, else 0; empty if `correct` is None.

        The list is padded with zeros to a multiple of eight.
        """
        packed = np.frombuffer(base64.b64decode(self.correct or ""), np.uint8)
        hits: list[int] = np.unpackbits(packed).tolist()
        return hits


def read_records(folder: Path) -> list[Record]:
    """All records in a folder, ordered by claim, arm and seed; empty if there is no folder.

    Raises:
        UsageError: a line is not a record.
    """
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UsageError(f"{path}, line {number}: must be a record ({error})") from error
    return sorted(records, key=_key)


def _key(record: Record) -> tuple[str, str, int]:
    return record.claim, record.arm, record.seed


def add_record(folder: Path, record: Record) -> None:
    """Write a record to its claim's file; it replaces a record of the same arm and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.claim}.jsonl"
    with FileLock(f"{path}.lock"):
        records = [record]
        for other in read_records(folder):
            if other.claim == record.claim and _key(other) != _key(record):
                records.append(other)
        lines = []
        for entry in sorted(records, key=_key):
            plain = json.loads(json_text(dataclasses.asdict(entry)))  # null for NaN
            if entry.correct is None:
                del plain["correct"]
            lines.append(f"{json.dumps(plain, ensure_ascii=False)}\n")
        write_text(path, "".join(lines))
