"""Image files (JPEG, PNG ...) wherever they are stored: decoded at once or when needed, and what happens where one cannot be."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Self

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qat.data import kept
from qat.data.arrays import MEGABYTE, ImageArrays, ImageSource, to_pixels
from qat.data.settings import DataSettings
from qat.errors import UsageError

log = logging.getLogger(__name__)

NAMED_AT_MOST = 20
SLOW_S = 2.0
# Of images that are decoded when needed so many are tried before a run begins: some seconds.
TRIED_AT_MOST = 1000
SKIP = "data.on_error=skip leaves out what cannot be decoded"
FORMAT = 1


class ImageError(UsageError):
    """An image cannot be decoded.

    A loader's worker process hands an exception on as text with a traceback, whose last line is the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class EncodedImages(ABC):
    """Image files by index, wherever they are stored: all, or some rows of them.

    Args:
        labels: (N,), class ids.
        where: what holds them, for messages.
    """

    def __init__(self, labels: NDArray[np.int64], where: str) -> None:
        self.labels, self.where, self.rows = labels, where, np.arange(len(labels))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: NDArray[np.int64]) -> Self:
        """The images at `indices`."""
        taken = copy.copy(self)
        taken.labels, taken.rows = self.labels[indices], self.rows[indices]
        return taken

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """One image, of which no more than the header needs to be decoded."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where it is, for messages."""

    @abstractmethod
    def origin(self) -> list[Any] | None:
        """What tells these images from any others, as plain data: files, their sizes and times, which rows of them; None = not known.

        Raises:
            OSError: a file is not there any more.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """What tells these images from any others wherever their folder lies: names below it, and labels; no image is read."""

    def row_bytes(self) -> bytes:
        """The rows as a fingerprint takes them."""
        return np.ascontiguousarray(self.rows, "<i8").tobytes()


def read_one(encoded: EncodedImages, index: int, chans: int) -> NDArray[np.uint8]:
    """Decode one image to (H, W, chans), grey where `chans` is 1, else RGB.

    Raises:
        ImageError: it cannot be decoded; names it and the reason.
    """
    try:
        return to_pixels(encoded.open(index), chans)
    except UnidentifiedImageError as error:
        raise ImageError(f"{encoded.name(index)} cannot be decoded (it begins like no known image format)") from error
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        raise ImageError(f"{encoded.name(index)} cannot be decoded ({' '.join(f'{error}'.split())})") from error


def read_all(encoded: EncodedImages, chans: int, on_error: str) -> ImageArrays:
    """Decode all images, which must be of one size.

    Args:
        encoded: the images.
        chans: colour channels of the result.
        on_error: `raise`, or `skip` = leave out what cannot be decoded, count and name it in a warning.

    Raises:
        ImageError: images cannot be decoded; names them together.
        UsageError: there are none, or sizes differ.
    """
    images, rows, failed = [], [], []
    for row in range(len(encoded)):
        try:
            images.append(read_one(encoded, row, chans))
            rows.append(row)
        except ImageError as error:
            failed.append(str(error))
    _report(failed, len(encoded), on_error)
    if not images:
        raise UsageError(f"{encoded.where}: no images")
    if len({image.shape for image in images}) > 1:
        raise UsageError(f"{encoded.where}: images have different sizes, one size is needed here")
    return ImageArrays(np.stack(images), encoded.labels[rows], len(failed))


def _report(failed: list[str], total: int, on_error: str) -> None:
    """Raise, or warn of, all images that cannot be decoded in one line."""
    if not failed:
        return
    more = f" and {len(failed) - NAMED_AT_MOST} more" if len(failed) > NAMED_AT_MOST else ""
    names = "; ".join(failed[:NAMED_AT_MOST]) + more
    if on_error == "raise":
        raise ImageError(f"{names}; {SKIP}" if total == len(failed) == 1 else f"{len(failed)} of {total} images: {names}; {SKIP}")
    log.warning("data.on_error=skip: left out %d of %d images: %s", len(failed), total, names)


def decoded(encoded: EncodedImages, settings: DataSettings) -> ImageArrays:
    """All images, which must be of one size, decoded; from the disk if an earlier run has left them there (`data.cache`).

    Args:
        encoded: the images.
        settings: with `in_chans`, `on_error` and `cache`.

    Raises:
        UsageError: an image cannot be decoded, there are none, or sizes differ.
    """
    found = _kept(encoded, settings)
    if found is not None:
        return found
    began = time.perf_counter()
    arrays = read_all(encoded, settings.in_chans, settings.on_error)
    seconds = time.perf_counter() - began
    origin = _origin(encoded, settings)
    is_slow = settings.cache is True or seconds > SLOW_S
    if origin is None or not is_slow or arrays.left_out:
        return arrays
    kept.keep(origin, arrays.images, f"{encoded.where}: decoded in {seconds:.0f} s")
    found = _kept(encoded, settings)  # what is mapped is shared by the processes of a machine
    return arrays if found is None else found


def _kept(encoded: EncodedImages, settings: DataSettings) -> ImageArrays | None:
    origin = _origin(encoded, settings)
    images = None if origin is None else kept.find(origin)
    return None if images is None else ImageArrays(images, encoded.labels)


def _origin(encoded: EncodedImages, settings: DataSettings) -> dict[str, Any] | None:
    """What decoded pixels depend on; None where they are not to be kept, or a file cannot be looked at."""
    try:
        images = encoded.origin() if settings.cache is not False else None
    except OSError:
        return None
    if images is None:
        return None
    return {"format": FORMAT, "decoder": f"Pillow {PIL.__version__}", "chans": settings.in_chans, "images": images}


def load(encoded: EncodedImages, settings: DataSettings) -> ImageSource:
    """In memory where the settings allow it, all images are of one size and they fit, else decoded when needed."""
    if settings.in_memory:
        arrays = _kept(encoded, settings)
        size = _one_size(encoded) if arrays is None else arrays.images.shape[1:3]
        pixels = 0 if size is None else len(encoded) * math.prod(size) * settings.in_chans
        if pixels > settings.memory_mb * MEGABYTE:
            needs = f"{pixels / MEGABYTE:.0f} MB once decoded, data.memory_mb={settings.memory_mb:g}"
            log.info("%s: %s: decoded when needed", encoded.where, needs)
        elif size is not None:
            return replace(decoded(encoded, settings) if arrays is None else arrays, known_as=encoded.fingerprint())
    images = LazyImages(encoded, settings.in_chans, settings.on_error)
    if len(encoded) <= TRIED_AT_MOST:
        images.try_all()
    return images


def _one_size(encoded: EncodedImages) -> tuple[int, int] | None:
    """The size of all images, from the headers alone; None if there are several. An image without a readable header says nothing."""
    sizes: set[tuple[int, int]] = set()
    for index in range(len(encoded)):
        try:
            sizes.add(encoded.open(index).size)
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
    """

    def __init__(self, encoded: EncodedImages, chans: int, on_error: str) -> None:
        self.encoded, self.on_error = encoded, on_error
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
                return read_one(self.encoded, row, self.chans), int(self.labels[row])
            except ImageError as error:
                self._note(row, error)
        raise ImageError(f"data.on_error=skip: none of {len(self)} images can be decoded")

    def try_all(self) -> None:
        """Decode each image once.

        Raises:
            ImageError: some cannot be decoded, and they are not to be skipped; names them together.
        """
        failed = []
        for row in range(len(self)):
            try:
                read_one(self.encoded, row, self.chans)
            except ImageError as error:
                self._failed[row] = True
                failed.append(str(error))
        _report(failed, len(self), self.on_error)

    def fingerprint(self) -> str:
        """That of the files."""
        return self.encoded.fingerprint()

    def _note(self, row: int, error: ImageError) -> None:
        if self.on_error == "raise":
            raise ImageError(f"{error}; {SKIP}") from error
        self._failed[row] = True
        log.warning("data.on_error=skip: %s; the next image replaces it (%d so far)", error, self.left_out)
