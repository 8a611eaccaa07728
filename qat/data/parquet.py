"""Images in parquet files as Hugging Face's `datasets` writes them: a struct of encoded bytes and an integer label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qat.data.image_data import SPLITS, EncodedImageData, data_folder
from qat.data.settings import DataSettings
from qat.data.sources import EncodedImages, digest, open_image
from qat.errors import UsageError

IMAGES, LABELS = ("img", "image"), ("label", "labels", "fine_label")


def find_parquet(root: Path, split: str) -> list[Path]:
    """Files below `root` whose names start with `split`, in order.

    Raises:
        UsageError: they lie in several folders; a second revision would bring validation images into train.
    """
    files = sorted(path for path in root.rglob(f"{split}*.parquet") if path.is_file())
    folders = {str(path.parent) for path in files}
    if len(folders) > 1:
        raise UsageError(
            f"data.root={str(root)!r}: must be a folder with {split}*.parquet in one place; has {', '.join(sorted(folders))}"
        )
    return files


class ParquetImages(EncodedImages):
    """The encoded images of some files, in memory.

    Args:
        files: parquet files with the same columns.
        settings: with `image_column` and `label_column`; None = one of `IMAGES`, of `LABELS`.

    Raises:
        UsageError: the files are not such parquet, or a label is missing.
    """

    def __init__(self, files: list[Path], settings: DataSettings) -> None:
        self.files = files
        where = f"{files[0].parent}: {files[0].name} ... {files[-1].name}"
        try:
            dataset = pq.ParquetDataset(files)
            there = dataset.schema.names
            wanted = ((settings.image_column, IMAGES), (settings.label_column, LABELS))
            columns = [
                next((c for c in ([named] if named else usual) if c in there), None)
                for named, usual in wanted
            ]
            if None in columns:
                raise UsageError(
                    f"{where}: data.image_column and data.label_column must be two of {', '.join(there)}"
                )
            self.cells, labels = dataset.read(columns).columns
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{where}: cannot be read as parquet ({error})") from error
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise UsageError(
                f"{where}: labels must be integers; the column has type {labels.type} and {labels.null_count} nulls"
            )
        super().__init__(labels.to_numpy().astype(np.int64), where, settings)

    def open(self, index: int) -> Image.Image:
        """One image; a cell is a struct with `bytes`, or the bytes themselves."""
        cell = self.cells[self.rows[index]].as_py()
        return open_image(cell["bytes"] if isinstance(cell, dict) else cell)

    def name(self, index: int) -> str:
        """Files, and row in all of them."""
        return f"{self.where}: image {self.rows[index]}"

    def fingerprint(self) -> str:
        """Of names and sizes of the files, the rows of them, and the labels."""
        files = json.dumps([[file.name, file.stat().st_size] for file in self.files])
        return digest(self.labels, files.encode(), self.row_bytes())


class HfParquet(EncodedImageData):
    """`train*.parquet`, `val*.parquet` and `test*.parquet` below `root`; the encoded images are in memory.

    Without val a tenth of train is held out, always the same images. Without test, or where its labels are not published, val is
    evaluated.
    """

    def encoded(self) -> dict[str, ParquetImages]:
        """All splits that there are.

        Raises:
            UsageError: `data.root` is not set or holds no such files, or a file is not of this kind.
        """
        root = data_folder(
            self.settings.root, "train*.parquet, and validation*.parquet or test*.parquet"
        )
        images = {
            split: ParquetImages(files, self.settings)
            for split in SPLITS
            if (files := find_parquet(root, split))
        }
        if "test" in images and np.all(images["test"].labels == -1):  # not published
            del images["test"]
        if not images:
            raise UsageError(f"data.root={self.settings.root!r}: holds no train*.parquet")
        return images
