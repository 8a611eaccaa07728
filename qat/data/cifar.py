"""CIFAR-10 as Hugging Face stores it: parquet files with encoded images."""

from __future__ import annotations

from qat.data.base import ImageArrays, ImageData, stratified_split
from qat.data.parquet import find_parquet, read_parquet


class Cifar10(ImageData):
    """`train*.parquet` and `test*.parquet` below `root`; a tenth of train is held out as val, always the same images."""

    HELD_OUT = 0.1

    def read(self) -> dict[str, ImageArrays]:
        """All three splits.

        Raises:
            UsageError: `data.root` is not set or holds no such files.
        """
        root, chans = self.settings.root, self.settings.in_chans
        everything = read_parquet(find_parquet(root, "train"), chans)
        test = read_parquet(find_parquet(root, "test"), chans)
        train, val = stratified_split(everything.labels, self.HELD_OUT)
        return {"train": everything.take(train), "val": everything.take(val), "test": test}
