"""Images in parquet files as Hugging Face's `datasets` writes them: a struct of encoded bytes and an integer label."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from qat.data.arrays import MEGABYTE, digest
from qat.data.encoded import EncodedImages
from qat.data.image_data import data_folder
from qat.data.kept import stamp
from qat.data.photos import Photos
from qat.errors import UsageError

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
UNPUBLISHED = -1
# Name, number, how many; older releases of `datasets` add a hash.
SHARD = re.compile(r"(.*?)(\d*)(-of-\d+)?(?:-[0-9a-f]{16})?")


def find_parquet(root: str | None, split: str) -> list[Path]:
    """Files below `root` whose name starts with `split`, in order.

    Raises:
        UsageError: no root, no such folder, no such files, or files that are not shards of one set.
    """
    files = _one_set(data_folder(root, "train*.parquet and test*.parquet"), split)
    if not files:
        raise UsageError(f"data.root={root!r}: holds no {split}*.parquet")
    return files


def _one_set(folder: Path, split: str) -> list[Path]:
    """The files of one split, in order; two revisions or a backup copy would bring validation images into train."""
    files = sorted(folder.rglob(f"{split}*.parquet"))
    for one, other in itertools.pairwise(files):
        (kind, number), (other_kind, other_number) = _shard(one), _shard(other)
        if kind != other_kind or number == other_number:
            two = f"{one.relative_to(folder)} and {other.relative_to(folder)}"
            raise UsageError(f"data.root={str(folder)!r}: must be a folder with one set of {split}*.parquet; has {two}")
    return files


def _shard(file: Path) -> tuple[tuple[Any, ...], str]:
    """What all shards of a set have in common, and the number of this one."""
    match = SHARD.fullmatch(file.stem)
    name, number, of = match.groups() if match else (file.stem, "", None)
    return (file.parent, name, of, bool(number)), number


class ParquetImages(EncodedImages):
    """The encoded images of some files, in memory.

    Args:
        files: parquet files with the same columns.
        image_column: name of the column of images; None = one of `IMAGE_COLUMNS`.
        label_column: name of the column of class ids; None = one of `LABEL_COLUMNS`.

    Raises:
        UsageError: a file is not such a parquet, or a label is missing.
    """

    def __init__(self, files: list[Path], image_column: str | None = None, label_column: str | None = None) -> None:
        self.files = files
        read = [_read_column(file, (image_column,) if image_column else IMAGE_COLUMNS, "image") for file in files]
        self.columns = [name for name, _ in read]
        self.cells = [cells for _, cells in read]
        self._ends = np.cumsum([len(cells) for cells in self.cells])
        where = f"{files[0].parent}/{', '.join(file.name for file in files)}"
        super().__init__(np.concatenate([read_labels(file, label_column) for file in files]), where)

    def origin(self) -> list[Any]:
        """Files, their columns, and a sum over the rows.

        Raises:
            OSError: a file is not there any more.
        """
        return [[stamp(file) for file in self.files], self.columns, len(self), hashlib.sha256(self.row_bytes()).hexdigest()]

    def fingerprint(self) -> str:
        """Of names and sizes of the files, the rows of them, and the labels."""
        files = json.dumps([[file.name, file.stat().st_size] for file in self.files])
        return digest(self.labels, files.encode(), self.row_bytes())

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the file, row in it."""
        row = int(self.rows[index])
        file = int(np.searchsorted(self._ends, row, side="right"))
        return file, row - int(self._ends[file]) + len(self.cells[file])

    def open(self, index: int) -> Image.Image:
        """One image; a cell is a struct with `bytes`, or the bytes themselves."""
        file, row = self._place(index)
        cell = self.cells[file][row].as_py()
        return Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell))

    def name(self, index: int) -> str:
        """File and row."""
        file, row = self._place(index)
        return f"{self.files[file]}: image {row}"


def read_labels(file: Path, label_column: str | None) -> NDArray[np.int64]:
    """The class ids of one file, (N,).

    Raises:
        UsageError: there is no such column, or a label is not a whole number.
    """
    labels = _read_column(file, (label_column,) if label_column else LABEL_COLUMNS, "label")[1].to_pylist()
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise UsageError(f"{file}: label {label!r} of image {row} is not a whole number")
    return np.asarray(labels, dtype=np.int64)


def _read_column(file: Path, names: tuple[str, ...], kind: str) -> tuple[str, pa.ChunkedArray]:
    """The first of the columns `names` that the file has."""
    try:
        there = pq.read_schema(file).names
        for name in names:
            if name in there:
                return name, pq.read_table(file, columns=[name]).column(name)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file}: cannot be read as parquet ({error})") from error
    raise UsageError(f"{file}: has columns {', '.join(there)}; one of {', '.join(names)} is needed; data.{kind}_column names another")


class HfParquet(Photos):
    """`train*.parquet`, `val*.parquet` and `test*.parquet` below `root`; images are in memory, decoded where they are of one size.

    Without val a tenth of train is held out, always the same images. Without test, or where its labels are not published, val is
    evaluated.
    """

    def encoded(self) -> dict[str, EncodedImages]:
        """All splits that there are.

        Raises:
            UsageError: `data.root` is not set or holds no train*.parquet, or a file is not of this kind.
        """
        files = {split: found for split, found in self._files(self.settings.root).items() if found}
        columns = self.settings.image_column, self.settings.label_column
        images = {split: ParquetImages(found, *columns) for split, found in files.items()}
        size = sum(cells.nbytes for one in images.values() for cells in one.cells) / MEGABYTE
        if size > self.settings.memory_mb:
            log.warning("data.root=%r: %.0f MB of encoded images are in memory; data=timm can map them", self.settings.root, size)
        if "test" in images and np.all(images["test"].labels == UNPUBLISHED):
            log.warning("data.root=%r: the test images have no labels, val is evaluated", self.settings.root)
            del images["test"]
        return dict(images)

    def count_classes(self, settings: dict[str, Any]) -> int:
        """Highest label of train plus one."""
        labels = [read_labels(file, settings.get("label_column")) for file in self._files(settings.get("root"))["train"]]
        return int(np.concatenate(labels).max(initial=-1)) + 1

    @staticmethod
    def _files(root: str | None) -> dict[str, list[Path]]:
        folder = data_folder(root, "train*.parquet, and validation*.parquet or test*.parquet")
        others = {split: _one_set(folder, split) for split in ("val", "test")}
        return {"train": find_parquet(root, "train"), **others}
