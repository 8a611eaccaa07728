"""Images in parquet files as Hugging Face's `datasets` writes them: a struct of encoded bytes and an integer label."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qat.data.arrays import ImageArrays, digest
from qat.data.encoded import as_labels
from qat.data.folders import data_folder
from qat.data.kept import FORMAT, MEGABYTE, decoded, keeping, place, stamp
from qat.errors import UsageError

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("img", "image")
COPIED_ROWS = 64
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
    """The encoded images of some files. Labels are read at once, images when the first of them is needed.

    Args:
        files: parquet files with the same columns.
        image_column: name of the column of images; None = one of `IMAGE_COLUMNS`.
        label_column: likewise.

    Raises:
        UsageError: a file is not such a parquet, or a label is missing.
    """

    def __init__(self, files: list[Path], image_column: str | None = None, label_column: str | None = None) -> None:
        self.files = files
        self.columns = [_column(file, (image_column,) if image_column else IMAGE_COLUMNS, "image") for file in files]
        labels = [read_labels(file, label_column) for file in files]
        self._cells: list[pa.ChunkedArray] = []  # one list for all that are taken from these
        self._ends = np.cumsum([len(one) for one in labels])
        self._starts = self._ends - [len(one) for one in labels]
        self.labels = as_labels([label for one in labels for label in one])
        self._rows = np.arange(len(self.labels))

    @property
    def cells(self) -> list[pa.ChunkedArray]:
        """The column of images of each file.

        Raises:
            UsageError: a file cannot be read.
        """
        if not self._cells:
            self._cells += [read_table(file, [name]).column(name) for file, name in zip(self.files, self.columns, strict=True)]
        return self._cells

    def hold(self, megabytes: float, *, keeps: bool) -> None:
        """Read the images into memory, or map a copy on the disk if they are more than that; it is made if it is not there.

        Raises:
            UsageError: a file cannot be read.
        """
        if not self._cells and keeps and _encoded_bytes(self.files) > megabytes * MEGABYTE:
            self._cells += [mapped_column(file, name) for file, name in zip(self.files, self.columns, strict=True)]
        _ = self.cells

    def origin(self) -> list[Any]:
        """Files, their columns, and a sum over the rows.

        Raises:
            OSError: a file is not there any more.
        """
        rows = hashlib.sha256(np.ascontiguousarray(self._rows, "<i8").data).hexdigest()
        return [[stamp(file) for file in self.files], self.columns, len(self), rows]

    def fingerprint(self) -> str:
        """Of names and sizes of the files, the rows of them, and the labels."""
        files = json.dumps([[file.name, file.stat().st_size] for file in self.files])
        return digest(self.labels, files.encode(), np.ascontiguousarray(self._rows, "<i8").data)

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
        return file, row - int(self._starts[file])

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
    return _reading(file, pq.read_table, file, columns=columns)


def _reading(file: Path, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `read` makes of a file; its complaints name the file."""
    try:
        return read(*args, **options)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file}: cannot be read as parquet ({error})") from error


def read_labels(file: Path, label_column: str | None) -> list[int]:
    """The class ids of one file.

    Raises:
        UsageError: there is no such column, or a label is not a whole number.
    """
    name = _column(file, (label_column,) if label_column else LABEL_COLUMNS, "label")
    labels = read_table(file, [name]).column(name).to_pylist()
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise UsageError(f"{file}: label {label!r} of image {row} is not a whole number")
    return labels


def _column(file: Path, names: tuple[str, ...], kind: str) -> str:
    """Which of the names the file has."""
    there = _reading(file, pq.read_schema, file).names
    for name in names:
        if name in there:
            return name
    raise UsageError(f"{file}: has columns {', '.join(there)}; one of {', '.join(names)} is needed; data.{kind}_column names another")


def _encoded_bytes(files: list[Path]) -> int:
    """Uncompressed bytes of all columns; images are nearly all of them."""
    metadata = [_reading(file, pq.read_metadata, file) for file in files]
    return sum(one.row_group(number).total_byte_size for one in metadata for number in range(one.num_row_groups))


def mapped_column(file: Path, name: str) -> pa.ChunkedArray:
    """A column as a map of an uncompressed copy on the disk, which is written a few rows at a time; read into memory where it cannot be.

    Raises:
        UsageError: it is no parquet file.
    """
    path = place([FORMAT, stamp(file), name], ".arrow")
    try:
        if not path.exists():
            log.info("%s: more than data.memory_mb; encoded images are kept in %s", file, path)
            with keeping(path) as temporary:
                _reading(file, _copy, file, name, temporary)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all().column(name)
    except OSError as error:
        log.warning("%s: encoded images are held in memory, %s cannot be written or read (%s)", file, path, error)
    except pa.ArrowException as error:
        log.warning("%s: encoded images are held in memory, %s is damaged (%s)", file, path, error)
        path.unlink(missing_ok=True)
    return read_table(file, [name]).column(name)


def _copy(file: Path, name: str, target: Path) -> None:
    with pq.ParquetFile(file) as source:
        schema = pa.schema([source.schema_arrow.field(name)])
        with pa.ipc.new_file(str(target), schema) as writer:
            for batch in source.iter_batches(COPIED_ROWS, columns=[name]):
                writer.write_batch(pa.record_batch([batch.column(name)], schema=schema))


def read_parquet(files: list[Path], chans: int, on_error: str = "raise", *, cache: str | bool = "auto") -> ImageArrays:
    """Decode all images of the files, which must be of one size.

    Args:
        files: parquet files with the same columns.
        chans: colour channels of the result.
        on_error: `raise`, or `skip` = leave out what cannot be decoded.
        cache: whether the result is kept for the next run, see `qat.data.kept.decoded`.

    Raises:
        UsageError: a file is not such a parquet, a label is missing, an image cannot be decoded, there are none, or sizes differ.
    """
    return decoded(ParquetImages(files), in_words(files), chans, on_error, cache=cache)


def in_words(files: list[Path]) -> str:
    """Folder and names of some files."""
    return f"{files[0].parent}/{', '.join(file.name for file in files)}"
