"""What a search or a reconstruction leaves on the disk: a table of what it did, and after each part all it needs to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import UsageError
from qat.utils.files import csv_lines, digest_of, read_torch, write_text, write_torch


class Progress:
    """NAME.ckpt and NAME.csv of work that is done part by part.

    Args:
        folder: the run directory; None = nothing is written.
        group: of the settings, as `ptq.reconstruct`; the last part is the name of the files.
        columns: of the table.
        settings: of the work, a dataclass.
        tensors: all that it starts from.
        run: settings of the whole run, stored for `read_state`.

    Attributes:
        rows: of the table, so far.
    """

    def __init__(
        self,
        folder: str | Path | None,
        group: str,
        columns: tuple[str, ...],
        settings: Any,
        tensors: Iterable[Tensor],
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.name, self.columns = group.rpartition(".")[2], columns
        self.settings = {f"{group}.{key}": value for key, value in asdict(settings).items()}
        self.inputs = digest_of(tensors)
        self.run = None if run is None else dict(run)
        self.rows: list[tuple[Any, ...]] = []

    def resume(self) -> dict[str, Any] | None:
        """What `save` was given last; None where there is no file.

        Raises:
            UsageError: it is of other work, or cannot be read.
        """
        if self.folder is None or not (path := self.folder / f"{self.name}.ckpt").is_file():
            return None
        content = read_state(path)
        for key, value in self.settings.items():
            if content["settings"].get(key) != value:
                raise UsageError(
                    f"{key}={value!r}: the run to resume has {content['settings'].get(key)!r} ({path})"
                )
        if content["inputs"] != self.inputs:
            raise UsageError(f"resume: {path} belongs to another model or other calibration images")
        self.rows = content["rows"]
        return dict(content["state"])

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace both files; at every moment there is a complete one of each."""
        if self.folder is None:
            return
        content = {
            "settings": self.settings,
            "inputs": self.inputs,
            "run": self.run,
            "rows": self.rows,
            "state": dict(state),
        }
        write_torch(self.folder / f"{self.name}.ckpt", content)
        write_text(self.folder / f"{self.name}.csv", csv_lines([self.columns, *self.rows]))


def read_state(path: Path) -> dict[str, Any]:
    """The content of a file of `Progress.save`; `run` is None in files of older versions.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        content = read_torch(path)
        kinds = {"settings": dict, "inputs": str, "rows": list, "state": dict}
        if not all(isinstance(content[key], kind) for key, kind in kinds.items()):
            raise TypeError("holds values of other types")
        return {"run": None, **content}
    except Exception as error:
        raise UsageError(f"resume: {path} cannot be read; delete it to start over") from error
