"""Images in parquet files as Hugging Face's `datasets` writes them: a struct of encoded bytes and an integer label."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qat.data.arrays import digest
from qat.data.encoded import EncodedImageData, EncodedImages, open_image
from qat.data.image_data import SPLITS, data_folder
from qat.data.settings import DataSettings
from qat.errors import UsageError

log = logging.getLogger(__name__)

COLUMNS = {"image": ("img", "image"), "label": ("label", "labels", "fine_label")}
UNPUBLISHED = -1
# What tells the shards of one set apart: a number, and in older releases of `datasets` a hash.
SHARD = re.compile(r"(?<!-of-)(?<!\d)\d+(?=-of-|$)|[0-9a-f]{16}$")


def find_parquet(root: Path, split: str) -> list[Path]:
    """Files below `root` whose names start with `split`, in order.

    Raises:
        UsageError: they are not the shards of one set; a second revision or a copy would bring validation images into train.
    """
    files = sorted(path for path in root.rglob(f"{split}*.parquet") if path.is_file())
    sets = {(path.parent, SHARD.sub("#", path.stem)): path.relative_to(root) for path in files}
    if len(sets) > 1:
        names = " and ".join(map(str, sets.values()))
        raise UsageError(f"data.root={str(root)!r}: must be a folder with one set of {split}*.parquet; has {names}")
    return files


class ParquetImages(EncodedImages):
    """The encoded images of some files, in memory.

    Args:
        files: parquet files with the same columns.
        settings: with `image_column` and `label_column`; None = one of `COLUMNS`.

    Raises:
        UsageError: a file is not such a parquet, or a label is missing.
    """

    def __init__(self, files: list[Path], settings: DataSettings) -> None:
        self.files = files
        self.cells = [_column(file, "image", settings.image_column) for file in files]
        self._starts = np.cumsum([0, *map(len, self.cells)])
        labels = [_column(file, "label", settings.label_column) for file in files]
        for file, column in zip(files, labels, strict=True):
            if column.null_count or not pa.types.is_integer(column.type):
                raise UsageError(f"{file}: the label of each image must be an integer, has {column.type} and {column.null_count} nulls")
        super().__init__(np.concatenate([column.to_numpy() for column in labels]).astype(np.int64), str(files[0]), settings)

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the file, row in it."""
        row = self.rows[index]
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return file, int(row - self._starts[file])

    def open(self, index: int) -> Image.Image:
        """One image; a cell is a struct with `bytes`, or the bytes themselves."""
        file, row = self._place(index)
        cell = self.cells[file][row].as_py()
        return open_image(cell["bytes"] if isinstance(cell, dict) else cell)

    def name(self, index: int) -> str:
        """File and row."""
        file, row = self._place(index)
        return f"{self.files[file]}: image {row}"

    def fingerprint(self) -> str:
        """Of names and sizes of the files, the rows of them, and the labels."""
        files = json.dumps([[file.name, file.stat().st_size] for file in self.files])
        return digest(self.labels, files.encode(), self.row_bytes())


def _column(file: Path, kind: str, named: str | None) -> pa.ChunkedArray:
    names = (named,) if named else COLUMNS[kind]
    try:
        there = pq.read_schema(file).names
        for name in names:
            if name in there:
                return pq.read_table(file, columns=[name]).column(name)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file}: cannot be read as parquet ({error})") from error
    raise UsageError(f"{file}: has columns {', '.join(there)}; one of {', '.join(names)} is needed; data.{kind}_column names another")


class HfParquet(EncodedImageData):
    """`train*.parquet`, `val*.parquet` and `test*.parquet` below `root`; the encoded images are in memory.

    Without val a tenth of train is held out, always the same images. Without test, or where its labels are not published, val is
    evaluated.
    """

    def encoded(self) -> dict[str, EncodedImages]:
        """All splits that there are.

        Raises:
            UsageError: `data.root` is not set or holds no such files, or a file is not of this kind.
        """
        root = data_folder(self.settings.root, "train*.parquet, and validation*.parquet or test*.parquet")
        images: dict[str, EncodedImages] = {}
        for split in SPLITS:
            if files := find_parquet(root, split):
                images[split] = ParquetImages(files, self.settings)
        if "test" in images and np.all(images["test"].labels == UNPUBLISHED):
            log.warning("data.root=%r: the test images have no labels, val is evaluated", self.settings.root)
            del images["test"]
        if not images:
            raise UsageError(f"data.root={self.settings.root!r}: holds no train*.parquet")
        return images
