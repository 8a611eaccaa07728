"""Any image classification set as Hugging Face's `datasets` stores it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from qat.data.arrays import ImageSource, stratified_split
from qat.data.folders import data_folder
from qat.data.lazy import load
from qat.data.parquet import ParquetImages, find_parquet, in_words, read_labels
from qat.data.photos import Photos

log = logging.getLogger(__name__)

UNPUBLISHED = -1


class HfParquet(Photos):
    """`train*.parquet`, `val*.parquet` and `test*.parquet` below `root`; images are in memory, decoded where they are of one size.

    More than `data.memory_mb` of encoded images are mapped from an uncompressed copy in the cache.

    Without val a tenth of train is held out, always the same images. Without test, or where its labels are not published, val is
    evaluated.
    """

    HELD_OUT = 0.1

    def read(self) -> dict[str, ImageSource]:
        """All splits that there are.

        Raises:
            UsageError: `data.root` is not set or holds no train*.parquet, or a file is not of this kind.
        """
        files = {split: found for split, found in self._files(self.settings.root).items() if found}
        columns = self.settings.image_column, self.settings.label_column
        images = {split: ParquetImages(found, *columns) for split, found in files.items()}
        if "test" in images and np.all(images["test"].labels == UNPUBLISHED):
            log.warning("data.root=%r: the test images have no labels, val is evaluated", self.settings.root)
            del images["test"]
        if "val" not in images:
            kept, out = stratified_split(images["train"].labels, self.HELD_OUT)
            images |= {"train": images["train"].take(kept), "val": images["train"].take(out)}
        return {split: load(one, self.settings, where=in_words(one.files)) for split, one in images.items()}

    def count_classes(self, settings: dict[str, Any]) -> int:
        """Highest label of train plus one."""
        column = settings.get("label_column")
        labels = (read_labels(file, column) for file in self._files(settings.get("root"))["train"])
        return max((max(one, default=-1) for one in labels), default=-1) + 1

    @staticmethod
    def _files(root: str | None) -> dict[str, list[Path]]:
        folder = data_folder(root, "train*.parquet, and validation*.parquet or test*.parquet")
        others = {split: sorted(folder.rglob(f"{split}*.parquet")) for split in ("val", "test")}
        return {"train": find_parquet(root, "train"), **others}
