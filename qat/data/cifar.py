"""CIFAR-10 as Hugging Face stores it (parquet files with encoded images), or in its original pickled batches.

A pickle is a program that names functions to call. Here only the four names that an array is stored with are known, and they stand
for records of our own: neither numpy nor anything else is called with what the file says. Source: the "python version" of
cs.toronto.edu/~kriz/cifar.html; torchvision's `CIFAR10` leaves the same folder behind.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qat.data.arrays import ImageArrays, stratified_split, with_channels
from qat.data.encoded import decoded
from qat.data.image_data import ImageData, data_folder
from qat.data.parquet import ParquetImages, find_parquet
from qat.errors import UsageError

FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
SIDE, CHANS = 32, 3


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


class _Record:
    """What a pickle builds in place of an array or a dtype: the arguments and the state, unread."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Builds lists, dicts, numbers, bytes and `_Record`."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Record,
        ("numpy._core.multiarray", "_reconstruct"): _Record,
        ("numpy", "ndarray"): _Record,
        ("numpy", "dtype"): _Record,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Called for every name in the file.

        Raises:
            UnpicklingError: the name is none of those that arrays need.
        """
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file needs")
        return self.KNOWN[module, name]


def _pixels(record: Any) -> NDArray[np.uint8]:
    """(N, 3072) from an array's record: state = (version, shape, dtype, is Fortran order, bytes)."""
    _, shape, dtype, is_fortran, content = record.state
    if dtype.args[0] not in {b"u1", "u1"} or is_fortran or math.prod(shape) != len(content):
        raise ValueError("data is not an array of bytes in rows")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_batch(path: Path) -> ImageArrays:
    """One file: a dict with `data` (N, 3072), channel by channel, and `labels`.

    Raises:
        UsageError: it is no such file, or asks for anything but an array.
    """
    try:
        batch = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images = _pixels(batch[b"data"]).reshape(-1, CHANS, SIDE, SIDE).transpose(0, 2, 3, 1)
        labels = np.asarray(batch[b"labels"], dtype=np.int64).reshape(len(images))
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UsageError(f"{path}: cannot be read as a batch of CIFAR-10 ({' '.join(f'{error}'.split())})") from error
    return ImageArrays(np.ascontiguousarray(images), labels)


def find_batches(root: Path) -> Path | None:
    """The folder with the batches: `root` or one below it; None where there is none."""
    candidates = (root, root / FOLDER)
    return next((folder for folder in candidates if (folder / TRAIN[0]).is_file()), None)


def read_batches(folder: Path, names: tuple[str, ...], chans: int) -> ImageArrays:
    """The images of some batches, joined.

    Args:
        folder: with the files.
        names: of the files.
        chans: colour channels of the result; 1 = grey.

    Raises:
        UsageError: a file is missing, damaged, or asks for anything but an array.
    """
    batches = [_read_batch(folder / name) for name in names]
    images = np.concatenate([batch.images for batch in batches])
    return ImageArrays(with_channels(images, chans), np.concatenate([batch.labels for batch in batches]))
