"""Fashion-MNIST in its original idx files: 70,000 grey images of 28 x 28 pixels.

An idx file is a magic number, big-endian sizes, bytes. Source: yann.lecun.com/exdb/mnist, "file format". torchvision reads only the
unpacked ones, in a folder of its own.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat.data.arrays import ImageArrays, stratified_split, with_channels
from qat.data.image_data import ImageData, data_folder
from qat.errors import UsageError

UNSIGNED_BYTES = 0x08


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
        images = _read_idx(root, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(root, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise UsageError(f"data.root={str(root)!r}: {prefix} has {len(images)} images and {len(labels)} labels")
        return ImageArrays(with_channels(images[..., None], self.settings.in_chans), labels.astype("int64"))


def _read_idx(root: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Images (N, H, W) or labels (N,) of the file `name` or `name.gz` below `root`."""
    found = sorted(path for path in root.rglob(f"{name}*") if path.name in {name, f"{name}.gz"})
    if not found:
        raise UsageError(f"data.root={str(root)!r}: holds no {name} or {name}.gz")
    path = found[0]
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, dimensions]) or len(content) < header:
        raise UsageError(f"{path}: is not an idx file of unsigned bytes with {dimensions} dimension(s)")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    if len(content) - header != math.prod(shape):
        raise UsageError(f"{path}: holds {len(content) - header} bytes of data, its header says {math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
