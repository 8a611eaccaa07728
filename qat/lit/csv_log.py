"""`metrics.csv`: Lightning's CSV logger, whose file survives a kill and goes on, row for row, where a checkpoint was written."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from qat.utils.files import appending, csv_rows, flush, write_text

Row = Mapping[str, Any]


class CSVLog(CSVLogger):
    """Lightning's logger; rows are appended, and a file that has to be written anew is replaced whole.

    A checkpoint says how many rows there were when it was written, and which was under way: `mark` and `go_back`.

    Attributes:
        goes_on: keep the rows of the file that is there.
    """

    goes_on = False

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, goes_on=self.goes_on)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def mark(self) -> int:
        """How many rows there are; they are on the disk when this returns."""
        writer: _Writer = self.experiment
        writer.save()
        if writer.count:
            flush(writer.path)
        return writer.count

    @rank_zero_only
    def go_back(self, rows: int, coming: Row) -> None:
        """Leave the first rows and the one that came next, if any; what was written behind them is written again."""
        writer: _Writer = self.experiment
        writer.replace([*read_rows(writer.path)[:rows], *([coming] if coming else [])])


class _Writer(ExperimentWriter):
    """Writes to the end of the file; replaces it at the start, and where there is a new column.

    Args:
        log_dir: folder of the file.
        goes_on: begin with the rows of the file that is there.

    Attributes:
        count: rows in the file.
    """

    def __init__(self, log_dir: str, *, goes_on: bool) -> None:
        super().__init__(log_dir)
        self.count = 0
        self._begun = False
        if goes_on and (rows := read_rows(self.path)):
            self.replace(rows)

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.metrics_file_path)

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the rows of a run that is to go on."""

    def save(self) -> None:
        """Write the rows since the last time."""
        if not self.metrics:
            return
        new, self.metrics = self.metrics, []
        if self._record_new_rows(new) or not self._begun:
            self.replace([*(read_rows(self.path) if self._begun else []), *new])
            return
        with appending(self.path) as file:
            file.write(_text(new, self.metrics_keys))
        self.count += len(new)

    def replace(self, rows: Sequence[Row]) -> None:
        """Write the whole file."""
        self._record_new_rows(rows)
        header = io.StringIO(newline="")
        csv.DictWriter(header, self.metrics_keys).writeheader()
        write_text(self.path, header.getvalue() + _text(rows, self.metrics_keys))
        self.count, self._begun = len(rows), True

    def _record_new_rows(self, rows: Sequence[Row]) -> set[str]:
        new = set().union(*rows) - set(self.metrics_keys)
        self.metrics_keys = sorted([*self.metrics_keys, *new])
        return new


def _text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics file without their empty cells; none if there is no file."""
    return [{key: value for key, value in row.items() if value} for row in csv_rows(path)] if path.is_file() else []
