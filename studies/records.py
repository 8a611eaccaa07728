"""The outcome of one run of one arm: `results/<ID>/<arm>-seed<N>.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.utils.files import write_text
from studies.checks import Fields, is_list, is_mapping, is_number, is_text, is_whole, wrong


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
        metrics: name to value.
        curves: name to points, `[[x, y], ...]`.
        maps: name to `{"x": [...], "y": [...], "z": [[...]]}`, z[y][x].
        wall_seconds: None where nobody looked at a clock.
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
    def place(self) -> str:
        """Where it is below the folder of results."""
        return f"{self.claim}/{self.arm}-seed{self.seed}.json"


def _may_lack(value: object) -> bool:
    return value is None or is_number(value)


def _may_be_unsaid(value: object) -> bool:
    return value is None or is_text(value)


def _is_map(value: object) -> bool:
    """Equally long rows, as many as there are places along y."""
    if not isinstance(value, dict) or set(value) != {"x", "y", "z"}:
        return False
    if not all(is_list(is_number)(value[axis]) for axis in "xy") or not is_list(is_list(_may_lack))(value["z"]):
        return False
    return [len(row) for row in value["z"]] == [len(value["x"])] * len(value["y"])


_IS_CURVE = is_list(lambda point: isinstance(point, list) and len(point) == 2 and is_number(point[0]) and _may_lack(point[1]))
_TEXT = (is_text, "a text that is not empty")
# In the order in which they are written.
_CHECKS: dict[str, tuple[Any, str]] = {
    "claim": _TEXT,
    "arm": _TEXT,
    "seed": (is_whole, "a whole number from 0"),
    "command": _TEXT,
    "further_commands": (is_mapping(is_text), "a mapping from names to commands"),
    "starts": (is_mapping(is_text), "a mapping from arms to digests"),
    "metrics": (is_mapping(_may_lack), "a mapping from names to numbers or null"),
    "curves": (is_mapping(_IS_CURVE), "a mapping from names to lists of [x, y]"),
    "maps": (is_mapping(_is_map), "a mapping from names to {x, y, z} with a row of z for every y"),
    "wall_seconds": (_may_lack, "a number or null"),
    "machine": _TEXT,
    "device": _TEXT,
    "versions": (is_mapping(_may_be_unsaid), "a mapping from names to texts or null"),
    "git_commit": (_may_be_unsaid, "a text or null"),
    "date": _TEXT,
}


def read_record(path: Path) -> Record:
    """One file.

    Raises:
        UsageError: one line that names file, key, value and what is allowed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise wrong(path, "content", str(error), "allowed is JSON") from error
    return _record(path, content)


def _record(path: Path, content: object) -> Record:
    read = Fields(path, "", content, tuple(_CHECKS))
    record = Record(**{name: read.take(name, *check) for name, check in _CHECKS.items()})
    if path.parts[-2:] != tuple(record.place.split("/")):
        raise wrong(path, "claim, arm, seed", record.place, f"allowed is what the file is called, {'/'.join(path.parts[-2:])}")
    return record


def read_records(folder: Path) -> list[Record]:
    """All records below a folder, ordered by claim, arm and seed; none where there is no folder.

    Raises:
        UsageError: one of them is not as it should be.
    """
    return sorted((read_record(path) for path in folder.rglob("*.json")), key=lambda record: (record.claim, record.arm, record.seed))


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all, a line for every metric, curve, map and command. Infinite and NaN become null.

    Raises:
        UsageError: it is not as it should be.
    """
    finite = _finite(content)
    _record(path, finite)
    lines = [f"  {json.dumps(name)}: {_shown(finite[name])}" for name in _CHECKS]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _shown(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return _plain(value)
    return "{\n" + ",\n".join(f"    {_plain(key)}: {_plain(entry)}" for key, entry in value.items()) + "\n  }"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with None in place of what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
