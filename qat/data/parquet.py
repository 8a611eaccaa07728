"""Images in parquet files of Hugging Face's `datasets`: encoded bytes and integer labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qat.data.image_data import SPLITS, EncodedImageData, data_folder
from qat.data.settings import DataSettings
from qat.data.sources import EncodedImages, digest, open_image
from qat.errors import UsageError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def find_parquet(root: Path, split: str) -> list[Path]:
    """Sorted parquet files below `root` whose names start with `split`.

    Raises:
        UsageError: the files are in several folders. These may be two revisions of a dataset; read
            together, they could mix validation images into train.
    """
    files = sorted(path for path in root.rglob(f"{split}*.parquet") if path.is_file())
    folders = {str(path.parent) for path in files}
    if len(folders) > 1:
        raise UsageError(
            f"data.root={str(root)!r}: must have all {split}*.parquet in one folder; "
            f"they are in {', '.join(sorted(folders))}"
        )
    return files


class ParquetImages(EncodedImages):
    """The encoded images of parquet files, in memory.

    Args:
        files: parquet files with the same columns.
        settings: see `EncodedImages`; if `image_column` or `label_column` is None, the column has
            one of the usual names in `IMAGE_COLUMNS` or `LABEL_COLUMNS`.

    Raises:
        UsageError: the files are not parquet files with these columns, there are no images, or a
            label is missing or is not an integer.
    """

    def __init__(self, files: list[Path], settings: DataSettings) -> None:
        self.files = files
        origin = f"{files[0].parent}: {files[0].name} ... {files[-1].name}"
        try:
            dataset = pq.ParquetDataset(files)
            names = dataset.schema.names
            image_column = _find_column(settings.image_column, IMAGE_COLUMNS, names)
            label_column = _find_column(settings.label_column, LABEL_COLUMNS, names)
            for setting, column in (("image_column", image_column), ("label_column", label_column)):
                if column is None:
                    raise UsageError(
                        f"{origin}: data.{setting}={getattr(settings, setting)!r}: the files have "
                        f"no such column; must be one of {', '.join(names)}"
                    )
            self.cells, labels = dataset.read([image_column, label_column]).columns
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{origin}: cannot be read as parquet ({error})") from error
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise UsageError(
                f"{origin}: labels must be integers; "
                f"the column has type {labels.type} and {labels.null_count} nulls"
            )
        super().__init__(labels.to_numpy().astype(np.int64), origin, settings)

    def open(self, index: int) -> Image.Image:
        """Open one image; a cell contains a struct with `bytes`, or the bytes themselves."""
        cell = self.cells[self.rows[index]].as_py()
        return open_image(cell["bytes"] if isinstance(cell, dict) else cell)

    def name(self, index: int) -> str:
        """First and last file, and the row number, counted over all files."""
        return f"{self.origin}: image {self.rows[index]}"

    def fingerprint(self) -> str:
        """Hash of labels, rows, file names and file sizes."""
        files = json.dumps([[file.name, file.stat().st_size] for file in self.files])
        return digest(self.labels, files.encode(), self.row_bytes())


def _find_column(
    setting: str | None, usual_names: Sequence[str], names: Sequence[str]
) -> str | None:
    """Return the name of the column to read, or None if the files lack it."""
    candidates = usual_names if setting is None else [setting]
    for candidate in candidates:
        if candidate in names:
            return candidate
    return None


class HfParquet(EncodedImageData):
    """Images in `train*.parquet`, `val*.parquet` and `test*.parquet` below `root`.

    The encoded images of all splits are kept in memory. If there is no val, a fixed tenth of train
    is held out. If there is no test, or all its labels are -1 (not published), val is evaluated.
    """

    def encoded(self) -> dict[str, ParquetImages]:
        """All existing splits, except a test split whose labels are all -1.

        Raises:
            UsageError: `data.root` is not a folder or has no such split, or the files of a split
                are in several folders or not as `ParquetImages` expects.
        """
        root = data_folder(self.settings.root, "train*.parquet, val*.parquet or test*.parquet")
        splits: dict[str, ParquetImages] = {}
        for split in SPLITS:
            files = find_parquet(root, split)
            if files:
                splits[split] = ParquetImages(files, self.settings)
        if "test" in splits and np.all(splits["test"].labels == -1):  # not published
            del splits["test"]
        if not splits:
            raise UsageError(
                f"data.root={self.settings.root!r}: must contain train*.parquet, val*.parquet, or "
                "test*.parquet with labels"
            )
        return splits
