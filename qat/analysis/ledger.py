"""Evaluations that are done, on the disk as they come: what was interrupted goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qat.analysis.analysis import Key, Row
from qat.errors import UsageError
from qat.utils.files import appending, flush, remove_unfinished, write_text

FILE = "points.jsonl"


class Ledger:
    """A line for each evaluation.

    Args:
        folder: the run directory.
        inputs: what all of them start from; the file of other inputs is not continued.
        resume: go on with what is there.

    Raises:
        UsageError: the file is of other inputs, or cannot be read.
    """

    def __init__(self, folder: Path, inputs: str, *, resume: bool) -> None:
        remove_unfinished([folder])
        self.path = folder / FILE
        self._done: dict[str, dict[str, Any]] = {}
        if resume and self.path.is_file():
            self._read(inputs)
        # A line that was being written is gone with the kill: what is whole is written anew.
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in [{"inputs": inputs}, *self._done.values()]))

    def __len__(self) -> int:
        return len(self._done)

    def row(self, key: Key) -> Row | None:
        """Key and values of an evaluation, None if it is not done."""
        found = self._done.get(_identity(key))
        return None if found is None else {**found["key"], **found["values"]}

    def record(self, key: Key, values: Row) -> Row:
        """Keep an evaluation, on the disk when this returns; gives its row."""
        entry = {"key": dict(key), "values": values}
        with appending(self.path) as file:
            file.write(json.dumps(entry) + "\n")
        flush(self.path)
        self._done[_identity(key)] = entry
        return {**key, **values}

    def _read(self, inputs: str) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            head, *entries = [json.loads(line) for line in lines if line.endswith("\n")]
            held = head["inputs"]
            self._done = {_identity(entry["key"]): {"key": entry["key"], "values": dict(entry["values"])} for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"resume: {self.path} cannot be read; resume=false starts anew") from error
        if held != inputs:
            raise UsageError(f"resume: {self.path} is of another net, other images or other settings; resume=false starts anew")


def _identity(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)
