"""Images in parquet files as Hugging Face's `datasets` writes them: a struct of encoded bytes and an integer label."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qat.data.arrays import ImageArrays
from qat.data.encoded import as_labels, read_all
from qat.data.folders import data_folder
from qat.errors import UsageError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def find_parquet(root: str | None, split: str) -> list[Path]:
    """Files below `root` whose name starts with `split`, in order.

    Raises:
        UsageError: no root, no such folder, or no such files.
    """
    files = sorted(data_folder(root, "train*.parquet and test*.parquet").rglob(f"{split}*.parquet"))
    if not files:
        raise UsageError(f"data.root={root!r}: holds no {split}*.parquet")
    return files


class ParquetImages:
    """The encoded images of some files, as they are in memory.

    Args:
        files: parquet files with the same columns.
        image_column: name of the column of images; None = one of `IMAGE_COLUMNS`.
        label_column: likewise.

    Raises:
        UsageError: a file is not such a parquet, or a label is missing.
    """

    def __init__(self, files: list[Path], image_column: str | None = None, label_column: str | None = None) -> None:
        self.files = files
        self.cells, labels = [], []
        for file in files:
            table = read_table(file)
            self.cells.append(_column(table, (image_column,) if image_column else IMAGE_COLUMNS, file, "image"))
            labels += read_labels(table, file, label_column)
        self._ends = np.cumsum([len(cells) for cells in self.cells])
        self._rows, self.labels = np.arange(len(labels)), as_labels(labels)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: NDArray[np.int64]) -> ParquetImages:
        """The images at `indices`."""
        taken = copy.copy(self)
        taken._rows, taken.labels = self._rows[indices], self.labels[indices]
        return taken

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the file, row in it."""
        row = int(self._rows[index])
        file = int(np.searchsorted(self._ends, row, side="right"))
        return file, row - int(self._ends[file]) + len(self.cells[file])

    def content(self, index: int) -> bytes:
        """The bytes of one image file; a cell is a struct with `bytes`, or the bytes themselves."""
        file, row = self._place(index)
        cell = self.cells[file][row].as_py()
        return cell["bytes"] if isinstance(cell, dict) else cell

    def name(self, index: int) -> str:
        """File and row."""
        file, row = self._place(index)
        return f"{self.files[file]}: image {row}"


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """One file, or some columns of it.

    Raises:
        UsageError: it is no parquet file.
    """
    try:
        return pq.read_table(file, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file}: cannot be read as parquet ({error})") from error


def read_labels(table: pa.Table, file: Path, label_column: str | None) -> list[int]:
    """The class ids of one file.

    Raises:
        UsageError: there is no such column, or a label is not a whole number.
    """
    labels = _column(table, (label_column,) if label_column else LABEL_COLUMNS, file, "label").to_pylist()
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise UsageError(f"{file}: label {label!r} of image {row} is not a whole number")
    return labels


def _column(table: pa.Table, names: tuple[str, ...], file: Path, kind: str) -> pa.ChunkedArray:
    for name in names:
        if name in table.column_names:
            return table.column(name)
    needed = f"one of {', '.join(names)} is needed; data.{kind}_column names another"
    raise UsageError(f"{file}: has columns {', '.join(table.column_names)}; {needed}")


def read_parquet(files: list[Path], chans: int, on_error: str = "raise") -> ImageArrays:
    """Decode all images of the files, which must be of one size.

    Args:
        files: parquet files with the same columns.
        chans: colour channels of the result.
        on_error: `raise`, or `skip` = leave out what cannot be decoded.

    Raises:
        UsageError: a file is not such a parquet, a label is missing, an image cannot be decoded, there are none, or sizes differ.
    """
    return read_all(ParquetImages(files), chans, on_error, where=in_words(files))


def in_words(files: list[Path]) -> str:
    """Folder and names of some files."""
    return f"{files[0].parent}/{', '.join(file.name for file in files)}"
