"""Files that a search or a reconstruction writes: a table, and a checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import UsageError
from qat.utils.files import csv_lines, hash_tensors, read_torch, write_text, write_torch


class Progress:
    """Progress of a job with several parts, stored in NAME.ckpt and NAME.csv.

    Args:
        folder: the run directory; None = write no files.
        group: group of the settings, such as `ptq.reconstruct`; NAME is its last part.
        columns: names of the columns of the table.
        settings: settings of the job, a dataclass.
        tensors: all inputs of the job, to recognize them in a resumed run.
        run: settings of the whole run, stored so that `read_state` returns them.

    Attributes:
        rows: rows of the table so far.
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
        self.name = group.rpartition(".")[2]
        self.columns = columns
        self.settings = {f"{group}.{key}": value for key, value in asdict(settings).items()}
        self.input_hash = hash_tensors(tensors)
        self.run = None if run is None else dict(run)
        self.rows: list[tuple[Any, ...]] = []

    def resume(self) -> dict[str, Any] | None:
        """Read the checkpoint, set `rows`, and return the state of the last `save`.

        Returns:
            The state; None if there is no checkpoint.

        Raises:
            UsageError: the checkpoint has other settings or inputs, or cannot be read.
        """
        if self.folder is None:
            return None
        path = self.folder / f"{self.name}.ckpt"
        if not path.is_file():
            return None
        content = read_state(path)
        for key, value in self.settings.items():
            stored_value = content["settings"].get(key)
            if stored_value != value:
                raise UsageError(
                    f"{key}={value!r}: must be {stored_value!r}, as in the run to resume ({path})"
                )
        if content["inputs"] != self.input_hash:
            raise UsageError(
                f"resume: {path} belongs to another model or other calibration images; "
                "use resume=false in another run_dir"
            )
        self.rows = content["rows"]
        return dict(content["state"])

    def save(self, state: Mapping[str, Any]) -> None:
        """Write table and checkpoint, each atomically; without `folder`, do nothing."""
        if self.folder is None:
            return
        content = {
            "settings": self.settings,
            "inputs": self.input_hash,
            "run": self.run,
            "rows": self.rows,
            "state": dict(state),
        }
        # Write the table first: after a stop in between, the resumed run writes both again.
        write_text(self.folder / f"{self.name}.csv", csv_lines([self.columns, *self.rows]))
        write_torch(self.folder / f"{self.name}.ckpt", content)


def read_state(path: Path) -> dict[str, Any]:
    """The content of a file written by `Progress.save`; `run` is None if none was stored.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        content = read_torch(path)
        kinds = {"settings": dict, "inputs": str, "rows": list, "state": dict}
        if not all(isinstance(content[key], kind) for key, kind in kinds.items()):
            raise TypeError("contains values of other types")
        return {"run": None, **content}
    except Exception as error:
        raise UsageError(f"resume: {path} cannot be read; delete it to start over") from error
