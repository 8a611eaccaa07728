"""Small sets that are one folder, or none: scikit-learn's digits, CIFAR-10 and Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torchvision import datasets

from qat.data.image_data import ImageData, data_folder
from qat.data.parquet import ParquetImages, find_parquet
from qat.data.sources import ImageArrays, ImageSource, hold_out, load, stratified_split, to_pixels
from qat.errors import UsageError


class Digits(ImageData):
    """1,797 handwritten digits of 8 x 8 grey pixels, part of scikit-learn: 70 % train, 10 % val, 20 % test; always the same images."""

    CLASSES = "0123456789"
    UNREAD = ("root", "on_error", "memory_mb", "image_column", "label_column", "model")

    def read(self) -> dict[str, ImageArrays]:
        """All three splits."""
        from sklearn.datasets import load_digits  # half a second that no other dataset needs

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        everything = ImageArrays(pixels, digits.target.astype(np.int64))
        rest, test = stratified_split(everything.labels, 0.2)
        train, val = stratified_split(everything.labels[rest], 0.125)
        return {
            "train": everything.take(rest[train]),
            "val": everything.take(rest[val]),
            "test": everything.take(test),
        }


class FashionMnist(ImageData):
    """`root/FashionMNIST/raw` as torchvision unpacks it; a tenth of train is held out as val, always the same images."""

    CLASSES = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    UNREAD = ("on_error", "memory_mb", "image_column", "label_column", "model")
    DATASET: ClassVar[Any] = datasets.FashionMNIST
    LAYOUT = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"

    def read(self) -> Mapping[str, ImageSource]:
        """All three splits.

        Raises:
            UsageError: `data.root` is not set or holds no such files, or one of them is damaged.
        """
        return hold_out({
            split: self._part(data_folder(self.settings.root, self.LAYOUT), split)
            for split in ("train", "test")
        })

    def _part(self, root: Path, split: str) -> ImageArrays:
        try:
            found = self.DATASET(root, train=split == "train", download=False)
        except Exception as error:  # on damaged files torchvision raises nearly anything
            raise UsageError(
                f"data.root={str(root)!r}: must hold complete {self.LAYOUT} ({' '.join(f'{error}'.split())})"
            ) from error
        images = [
            to_pixels(Image.fromarray(image), self.settings.in_chans)
            for image in np.asarray(found.data)
        ]
        return ImageArrays(np.stack(images), np.asarray(found.targets, dtype=np.int64))


class Cifar10(FashionMnist):
    """`train*.parquet` and `test*.parquet` below `root`, or else `root/cifar-10-batches-py`; a tenth of train is held out as val.

    torchvision unpickles the batches only once their sums are those of the published files.
    """

    CLASSES = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    UNREAD = ("memory_mb", "model")
    DATASET = datasets.CIFAR10
    LAYOUT = "train*.parquet and test*.parquet, or cifar-10-batches-py"

    def read(self) -> Mapping[str, ImageSource]:
        """All three splits.

        Raises:
            UsageError: `data.root` is not set or holds no such files, or one of them is damaged.
        """
        files = {
            split: find_parquet(data_folder(self.settings.root, self.LAYOUT), split)
            for split in ("train", "test")
        }
        if not all(files.values()):
            return super().read()
        return hold_out({
            split: load(ParquetImages(found, self.settings)) for split, found in files.items()
        })
