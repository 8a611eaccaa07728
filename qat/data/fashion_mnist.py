"""Fashion-MNIST in its original idx files: 70,000 grey images of 28 x 28 pixels."""

from __future__ import annotations

from pathlib import Path

from qat.data.arrays import ImageArrays, stratified_split, with_channels
from qat.data.folders import data_folder
from qat.data.idx import read_idx
from qat.data.image_data import ImageData
from qat.errors import UsageError


class FashionMnist(ImageData):
    """`{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]` below `root`; a tenth of train is held out as val, always the same images."""

    HELD_OUT = 0.1
    CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

    def read(self) -> dict[str, ImageArrays]:
        """All three splits.

        Raises:
            UsageError: `data.root` is not set, lacks a file, or a file is damaged.
        """
        root = data_folder(self.settings.root, "train-images-idx3-ubyte[.gz] and its three companions")
        everything, test = self._part(root, "train"), self._part(root, "t10k")
        train, val = stratified_split(everything.labels, self.HELD_OUT)
        return {"train": everything.take(train), "val": everything.take(val), "test": test}

    def _part(self, root: Path, prefix: str) -> ImageArrays:
        images = read_idx(_find(root, f"{prefix}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_find(root, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
        if len(images) != len(labels):
            raise UsageError(f"data.root={str(root)!r}: {prefix} has {len(images)} images and {len(labels)} labels")
        return ImageArrays(with_channels(images[..., None], self.settings.in_chans), labels.astype("int64"))


def _find(root: Path, name: str) -> Path:
    found = sorted(path for path in root.rglob(f"{name}*") if path.name in {name, f"{name}.gz"})
    if not found:
        raise UsageError(f"data.root={str(root)!r}: holds no {name} or {name}.gz")
    return found[0]
