"""CIFAR-10 as Hugging Face stores it (parquet files with encoded images), or in its original pickled batches."""

from __future__ import annotations

import dataclasses

from qat.data.arrays import ImageArrays, stratified_split
from qat.data.base import ImageData, data_folder
from qat.data.encoded import decoded
from qat.data.parquet import ParquetImages, find_parquet
from qat.data.pickled import FOLDER, TEST, TRAIN, find_batches, read_batches
from qat.errors import UsageError


class Cifar10(ImageData):
    """A tenth of train is held out as val, always the same images.

    Below `root` are `train*.parquet` and `test*.parquet`, or else `cifar-10-batches-py` as torchvision unpacks it.
    """

    HELD_OUT = 0.1
    CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def read(self) -> dict[str, ImageArrays]:
        """All three splits.

        Raises:
            UsageError: `data.root` is not set or holds no such files, or one of them is damaged.
        """
        everything, test = self._parts()
        train, val = stratified_split(everything.labels, self.HELD_OUT)
        # What was left out is counted where it would be trained on.
        kept = dataclasses.replace(everything.take(train), left_out=everything.left_out)
        return {"train": kept, "val": everything.take(val), "test": test}

    def _parts(self) -> tuple[ImageArrays, ImageArrays]:
        settings = self.settings
        root = data_folder(settings.root, f"train*.parquet and test*.parquet, or {FOLDER}")
        if any(root.rglob("train*.parquet")):
            files = (find_parquet(settings.root, split) for split in ("train", "test"))
            train, test = (decoded(ParquetImages(found), settings) for found in files)
            return train, test
        batches = find_batches(root)
        if batches is None:
            raise UsageError(f"data.root={settings.root!r}: holds neither train*.parquet nor {FOLDER}/{TRAIN[0]}")
        train, test = (read_batches(batches, names, settings.in_chans) for names in (TRAIN, TEST))
        return train, test
