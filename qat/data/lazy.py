"""Images that are decoded one at a time, when they are needed."""

from __future__ import annotations

import io
import itertools
import logging
import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qat.data.arrays import ImageSource, squeeze
from qat.data.encoded import EncodedImages, ImageError, read_one
from qat.data.kept import MEGABYTE, decoded, find
from qat.data.settings import DataSettings

log = logging.getLogger(__name__)


def load(encoded: EncodedImages, settings: DataSettings, where: str) -> ImageSource:
    """In memory where the settings allow it, all images are of one size and they fit, else decoded when needed."""
    kept = find(encoded, settings.in_chans, cache=settings.cache) if settings.in_memory else None
    if kept is not None and fits(kept.images.nbytes, settings, where):
        return replace(kept, known_as=encoded.fingerprint())
    encoded.hold(settings.memory_mb, keeps=settings.cache is not False)
    size = _one_size(encoded) if settings.in_memory and kept is None else None
    if size is not None and fits(len(encoded) * math.prod(size) * settings.in_chans, settings, where):
        arrays = decoded(encoded, where, settings.in_chans, settings.on_error, cache=settings.cache)
        return replace(arrays, known_as=encoded.fingerprint())
    return LazyImages(encoded, settings.in_chans, settings.on_error)


def fits(size: int, settings: DataSettings, where: str) -> bool:
    """True if so many bytes of images may be in memory; says so if not."""
    if size <= settings.memory_mb * MEGABYTE:
        return True
    log.info("%s: %.0f MB once decoded, data.memory_mb=%g: decoded when needed", where, size / MEGABYTE, settings.memory_mb)
    return False


def _one_size(encoded: EncodedImages) -> tuple[int, int] | None:
    """The size of all images, from the headers alone; None if there are several. An image without a readable header says nothing."""
    sizes: set[tuple[int, int]] = set()
    for index in range(len(encoded)):
        try:
            sizes.add(Image.open(io.BytesIO(encoded.content(index))).size)
        except Exception:  # noqa: S112  (who decodes it says so)
            continue
        if len(sizes) > 1:
            return None
    return next(iter(sizes), (0, 0))


class LazyImages:
    """Images that are decoded each time they are needed.

    Under `skip` an image that cannot be decoded gives way to the next one that can, with the label of that one: always the same, so
    that the number of images, their order and their random draws stay what they are.

    Args:
        encoded: the images.
        chans: colour channels of the result.
        on_error: `raise` or `skip`.
        size: side in pixels of the square that images are squeezed into; None = as they are.
    """

    def __init__(self, encoded: EncodedImages, chans: int, on_error: str, size: int | None = None) -> None:
        self.encoded, self.on_error, self.size = encoded, on_error, size
        self.chans = 1 if chans == 1 else 3
        # Shared with the loader's worker processes, so that a file is named once and not once for each of them.
        self._failed = torch.zeros(len(encoded), dtype=torch.bool).share_memory_()

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,), class ids as stored; a replaced image comes with the label of its replacement."""
        return self.encoded.labels

    @property
    def left_out(self) -> int:
        """How many images turned out so far, in any of the loader's processes, to be such that they cannot be decoded."""
        return int(self._failed.sum())

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image (H, W, C) and class id.

        Raises:
            ImageError: it cannot be decoded; under `skip`, none can.
        """
        for row in itertools.chain(range(index, len(self)), range(index)):
            if self._failed[row]:
                continue
            try:
                image = read_one(self.encoded, row, self.chans)
            except ImageError as error:
                self._note(row, error)
                continue
            return (image if self.size is None else squeeze(image, self.size)), int(self.labels[row])
        raise ImageError(f"data.on_error=skip: none of {len(self)} images can be decoded")

    def fingerprint(self) -> str:
        """That of the files."""
        return self.encoded.fingerprint()

    def resized(self, size: int) -> LazyImages:
        """The same, squeezed into `size` x `size` pixels once decoded."""
        return LazyImages(self.encoded, self.chans, self.on_error, size)

    def _note(self, row: int, error: ImageError) -> None:
        if self.on_error == "raise":
            raise error
        self._failed[row] = True
        log.warning("data.on_error=skip: %s; the next image replaces it (%d so far)", error, self.left_out)
