"""Small datasets: scikit-learn's digits, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torchvision import datasets

from qat.data.image_data import ImageData, data_folder
from qat.data.parquet import ParquetImages, find_parquet
from qat.data.sources import ImageArrays, ImageSource, load, to_pixels
from qat.data.splits import hold_out, stratified_split
from qat.errors import UsageError


class Digits(ImageData):
    """1,797 handwritten digits of 8 x 8 grey pixels, part of scikit-learn.

    The splits are fixed: 70 % train, 10 % val, 20 % test.
    """

    CLASSES = "0123456789"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "image_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "mean": (0.3051,),
        "std": (0.3759,),
    }
    UNREAD: ClassVar[Sequence[str]] = (
        "root",
        "on_error",
        "memory_mb",
        "image_column",
        "label_column",
        "model",
    )

    def read(self) -> dict[str, ImageArrays]:
        """All three splits."""
        # The import is here because it takes half a second, and no other dataset needs it.
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        images = ImageArrays(pixels, digits.target.astype(np.int64))
        train_and_val, test = stratified_split(images.labels, 0.2)
        train, val = stratified_split(images.labels[train_and_val], 0.125)
        return {
            "train": images.take(train_and_val[train]),
            "val": images.take(train_and_val[val]),
            "test": images.take(test),
        }


class FashionMnist(ImageData):
    """Fashion-MNIST in `root/FashionMNIST/raw`, as torchvision unpacks it.

    A fixed tenth of train is held out as val.
    """

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
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "image_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "mean": (0.2860,),
        "std": (0.3530,),
    }
    UNREAD: ClassVar[Sequence[str]] = (
        "on_error",
        "memory_mb",
        "image_column",
        "label_column",
        "model",
    )
    DATASET: ClassVar[Any] = datasets.FashionMNIST
    LAYOUT = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"

    def read(self) -> Mapping[str, ImageSource]:
        """All three splits.

        Raises:
            UsageError: `data.root` is not set or lacks the files of `LAYOUT`, or a file is damaged.
        """
        root = data_folder(self.settings.root, self.LAYOUT)
        return hold_out({
            "train": self._read_split(root, is_train=True),
            "test": self._read_split(root, is_train=False),
        })

    def _read_split(self, root: Path, *, is_train: bool) -> ImageArrays:
        try:
            dataset = self.DATASET(root, train=is_train, download=False)
        except Exception as error:  # on damaged files, torchvision may raise any exception
            raise UsageError(
                f"data.root={str(root)!r}: must contain complete {self.LAYOUT} ({error})"
            ) from error
        images = [Image.fromarray(image) for image in np.asarray(dataset.data)]
        pixels = [to_pixels(image, self.settings.in_chans) for image in images]
        return ImageArrays(np.stack(pixels), np.asarray(dataset.targets, dtype=np.int64))


class Cifar10(FashionMnist):
    """CIFAR-10: `train*.parquet` and `test*.parquet` below `root`, or `root/cifar-10-batches-py`.

    A tenth of train is held out as val. torchvision unpickles the batches only if their checksums
    match the published files.
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
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "image_size": 32,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 10,
        "mean": (0.4911, 0.4820, 0.4466),
        "std": (0.2453, 0.2428, 0.2606),
    }
    UNREAD: ClassVar[Sequence[str]] = ("memory_mb", "model")
    DATASET = datasets.CIFAR10
    LAYOUT = "train*.parquet and test*.parquet, or cifar-10-batches-py"

    def read(self) -> Mapping[str, ImageSource]:
        """All three splits.

        Raises:
            UsageError: `data.root` is not set, or lacks usable files of `LAYOUT`.
        """
        root = data_folder(self.settings.root, self.LAYOUT)
        train_files = find_parquet(root, "train")
        test_files = find_parquet(root, "test")
        if not train_files or not test_files:
            return super().read()
        return hold_out({
            "train": load(ParquetImages(train_files, self.settings)),
            "test": load(ParquetImages(test_files, self.settings)),
        })
