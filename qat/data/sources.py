"""Images by index: decoded in memory, or encoded and decoded when needed."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import logging
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qat.data.settings import DataSettings
from qat.errors import UsageError
from qat.utils.text import read_file

log = logging.getLogger(__name__)

# PostScript is excluded: Pillow would run such a file in Ghostscript, whatever its extension.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SKIP_ADVICE = "data.on_error=skip skips images that cannot be decoded"


class ImageError(UsageError):
    """An image cannot be decoded.

    A loader's worker process sends the exception as text with a traceback; the constructor extracts
    the message from its last line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


def digest(labels: NDArray[np.int64], *contents: bytes | memoryview) -> str:
    """Hash of labels (N,) and of bytes that identify the images, as 32 hexadecimal digits."""
    hasher = hashlib.blake2b(np.ascontiguousarray(labels, "<i8").data, digest_size=16)
    for content in contents:
        hasher.update(content)
    return hasher.hexdigest()


@dataclass(frozen=True)
class ImageArrays:
    """Decoded images in memory.

    Attributes:
        images: (N, H, W, C), uint8.
        labels: (N,), class ids.
        file_fingerprint: fingerprint of the files from which the images were decoded; None if
            unknown.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    file_fingerprint: str | None = None

    @property
    def chans(self) -> int:
        """Number of colour channels."""
        return self.images.shape[3]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])

    def take(self, indices: NDArray[np.int64]) -> ImageArrays:
        """The images at `indices`."""
        return ImageArrays(self.images[indices], self.labels[indices])

    def fingerprint(self) -> str:
        """The fingerprint of the files if known, else a hash of labels and pixels."""
        return self.file_fingerprint or digest(self.labels, np.ascontiguousarray(self.images).data)


def to_pil(image: NDArray[np.uint8]) -> Image.Image:
    """Convert an array (H, W, C) to a Pillow image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def to_pixels(image: Image.Image, chans: int) -> NDArray[np.uint8]:
    """Convert a Pillow image of any mode to grey (H, W, 1) if `chans` is 1, else to RGB (H, W, 3).

    As in torchvision and timm (`convert`), transparency is dropped, and a rotation in EXIF is
    ignored. 16-bit grey is scaled, because Pillow would clip it at 255, which turns most of an
    image white.

    Raises:
        ValueError: pixels are floats or do not fit in 16 bits, so no value is defined as white.
    """
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 2**16 - 1:
            raise ValueError(
                f"32 bits per pixel (mode {image.mode}) and no defined white level; "
                "save the image with 8 or 16 bits"
            )
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    pixels = np.asarray(image.convert("L" if chans == 1 else "RGB"))
    return pixels.reshape(image.height, image.width, -1)


def open_file(path: str | os.PathLike[str]) -> Image.Image:
    """Open a file as a Pillow image; only the header is decoded."""
    return open_image(read_file(path))


def open_image(content: bytes) -> Image.Image:
    """Open bytes in one of `FORMATS` as a Pillow image; only the header is decoded."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def decode(open_image_file: Callable[[], Image.Image], chans: int, name: str) -> NDArray[np.uint8]:
    """Open and decode an image as (H, W, C), grey if `chans` is 1, else RGB.

    Args:
        open_image_file: function that opens the image.
        chans: 1 or 3.
        name: name of the image, for messages.

    Raises:
        ImageError: the image cannot be opened or decoded.
    """
    try:
        return to_pixels(open_image_file(), chans)
    except Exception as error:  # on damaged files, Pillow's readers may raise any exception
        reason = re.sub(r" <[^>]*>", "", str(error))  # object reprs with memory addresses
        raise ImageError(f"{name} cannot be decoded ({reason})") from error


class EncodedImages(ABC):
    """Encoded images by index, either all stored images or a selection; decoded at every access.

    Args:
        labels: (N,), class ids.
        origin: the file or folder of the images, for messages.
        settings: `in_chans` and `on_error` are used. `on_error=skip` replaces an image that cannot
            be decoded, and its label, by the next decodable image and its label. The replacement is
            always the same. The number of images, their order and random draws do not change.

    Attributes:
        rows: (N,), number of each image among the stored images.

    Raises:
        UsageError: there are no images.
    """

    def __init__(self, labels: NDArray[np.int64], origin: str, settings: DataSettings) -> None:
        if not len(labels):
            raise UsageError(f"{origin}: has no images")
        self.labels = labels
        self.origin = origin
        self.rows = np.arange(len(labels))
        self.on_error = settings.on_error
        # One entry per row, in shared memory, so that only one worker process warns of an image.
        self._has_warned = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
        self.chans = 1 if settings.in_chans == 1 else 3

    def take(self, indices: NDArray[np.int64]) -> Self:
        """The images at `indices`."""
        selection = copy.copy(self)
        selection.labels = self.labels[indices]
        selection.rows = self.rows[indices]
        return selection

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Open one image; only the header needs to be decoded."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of one image, for messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of labels and of names or rows, independent of the folder's location.

        No image is read, so changed contents of a file may not be noticed.
        """

    def row_bytes(self) -> bytes:
        """The rows as bytes, for fingerprints."""
        return np.ascontiguousarray(self.rows, "<i8").tobytes()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image (H, W, C), grey if `in_chans` is 1, else RGB, and its class id.

        Raises:
            ImageError: the image cannot be decoded, or with `on_error=skip`, no image can be
                decoded.
        """
        for position in itertools.chain(range(index, len(self)), range(index)):
            name = self.name(position)
            try:
                image = decode(partial(self.open, position), self.chans, name)
            except ImageError as error:
                if self.on_error == "raise":
                    raise ImageError(f"{error}; {SKIP_ADVICE}") from error
                row = self.rows[position]
                if not self._has_warned[row]:
                    log.warning("data.on_error=skip: %s; the next image is used instead", error)
                    self._has_warned[row] = True
            else:
                return image, int(self.labels[position])
        raise ImageError(f"data.on_error=skip: {self.origin}: no image can be decoded")


ImageSource = ImageArrays | EncodedImages


def load(encoded: EncodedImages, memory_mb: float = math.inf) -> ImageSource:
    """Decode all images into memory if they have the same size and fit in `memory_mb`.

    Otherwise, return `encoded` itself. Raises `ImageError` if `encoded[i]` does.
    """
    images: list[NDArray[np.uint8]] = []
    # `encoded[i]` may return the next image instead of a damaged one, so use the label it returns.
    labels = np.empty_like(encoded.labels)
    for index in range(len(encoded)):
        image, labels[index] = encoded[index]
        is_too_large = image.nbytes * len(encoded) > memory_mb * 1e6
        if is_too_large or (images and image.shape != images[0].shape):
            return encoded
        images.append(image)
    return ImageArrays(np.stack(images), labels)


def resize_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize an image (H, W, C) to (size, size, C), bicubic, without keeping the aspect ratio."""
    if image.shape[:2] == (size, size):
        return image
    resized_image = to_pil(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized_image).reshape(size, size, image.shape[2])
