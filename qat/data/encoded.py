"""Encoded images (JPEG, PNG ...), and what happens where one cannot be decoded."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qat.data.arrays import ImageArrays, to_pixels
from qat.errors import UsageError

log = logging.getLogger(__name__)

NAMED_AT_MOST = 20


class ImageError(UsageError):
    """An image cannot be decoded.

    A loader's worker process hands an exception on as text with a traceback, whose last line is the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class EncodedImages(Protocol):
    """Image files by index, wherever they are stored."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,), class ids."""

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes:
        """The bytes of one image file."""

    def name(self, index: int) -> str:
        """Where it is, for messages."""

    def origin(self) -> list[Any]:
        """What tells these images from any others, as plain data: files, their sizes and times, which images of them.

        Raises:
            OSError: a file is not there any more.
        """

    def fingerprint(self) -> str:
        """What tells these images from any others wherever their folder lies: names below it, and labels; no image is read."""

    def hold(self, megabytes: float, *, keeps: bool) -> None:
        """Get ready to hand out single images, once and before worker processes are forked.

        Args:
            megabytes: what may be in memory for that.
            keeps: True if more than that may be kept on the disk in a form that can be mapped.
        """


def decode(content: bytes, chans: int) -> NDArray[np.uint8]:
    """One encoded image as (H, W, chans) uint8; chans 1 = grey, 3 = RGB."""
    return to_pixels(Image.open(io.BytesIO(content)), chans)


def read_one(encoded: EncodedImages, index: int, chans: int) -> NDArray[np.uint8]:
    """Decode one image to (H, W, chans).

    Raises:
        ImageError: it cannot be decoded; names it and the reason.
    """
    try:
        return decode(encoded.content(index), chans)
    except UnidentifiedImageError as error:
        raise ImageError(f"{encoded.name(index)} cannot be decoded (it begins like no known image format)") from error
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        raise ImageError(f"{encoded.name(index)} cannot be decoded ({' '.join(f'{error}'.split())})") from error


def read_all(encoded: EncodedImages, chans: int, on_error: str, where: str) -> ImageArrays:
    """Decode all images, which must be of one size.

    Args:
        encoded: the images.
        chans: colour channels of the result.
        on_error: `raise`, or `skip` = leave out what cannot be decoded, count and name it in a warning.
        where: what holds the images, for messages.

    Raises:
        UsageError: an image cannot be decoded, there are none, or sizes differ.
    """
    images, rows, failed = [], [], []
    for row in range(len(encoded)):
        try:
            images.append(read_one(encoded, row, chans))
            rows.append(row)
        except ImageError as error:
            if on_error == "raise":
                raise
            failed.append(str(error))
    if failed:
        more = f" and {len(failed) - NAMED_AT_MOST} more" if len(failed) > NAMED_AT_MOST else ""
        names = "; ".join(failed[:NAMED_AT_MOST])
        log.warning("data.on_error=skip: left out %d of %d images: %s%s", len(failed), len(encoded), names, more)
    if not images:
        raise UsageError(f"{where}: no images")
    if len({image.shape for image in images}) > 1:
        raise UsageError(f"{where}: images have different sizes, one size is needed here")
    return ImageArrays(np.stack(images), encoded.labels[rows], len(failed))


def as_labels(labels: Sequence[int]) -> NDArray[np.int64]:
    """(N,), as all datasets hold them."""
    return np.asarray(labels, dtype=np.int64)
