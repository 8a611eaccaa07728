"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, part of the package, nothing to download."""

from __future__ import annotations

import numpy as np

from qat.data.arrays import ImageArrays, stratified_split
from qat.data.image_data import ImageData

BRIGHTEST = 16


class Digits(ImageData):
    """70 % train, 10 % val, 20 % test; always the same images."""

    CLASSES = "0123456789"

    def read(self) -> dict[str, ImageArrays]:
        """All three splits."""
        from sklearn.datasets import load_digits  # half a second that no other dataset needs

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8)[..., None]
        everything = ImageArrays(pixels, digits.target.astype(np.int64))
        rest, test = stratified_split(everything.labels, 0.2)
        train, val = stratified_split(everything.labels[rest], 0.125)
        return {"train": everything.take(rest[train]), "val": everything.take(rest[val]), "test": everything.take(test)}
