"""Images by index, decoded in memory or encoded wherever they are stored; and their splits."""

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qat.data.settings import DataSettings
from qat.errors import UsageError
from qat.launch.ranks import is_first
from qat.utils.text import read_file

log = logging.getLogger(__name__)

# One fixed division into train, val and test: results of different runs and seeds are on the same images.
SPLIT_SEED, HELD_OUT = 0, 0.1
SAMPLE = 64
# Pillow would have a PostScript file run by Ghostscript, whatever its name.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SKIP = "data.on_error=skip leaves out what cannot be decoded"


class ImageError(UsageError):
    """An image cannot be decoded.

    A loader's worker process sends an exception as text with a traceback, whose last line is the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


def digest(labels: NDArray[np.int64], *contents: bytes | memoryview) -> str:
    """A fingerprint of labels (N,) and of what stands for the images, 32 digits."""
    found = hashlib.blake2b(np.ascontiguousarray(labels, "<i8").data, digest_size=16)
    for content in contents:
        found.update(content)
    return found.hexdigest()


@dataclass(frozen=True)
class ImageArrays:
    """Decoded images in memory.

    Attributes:
        images: (N, H, W, C), uint8.
        labels: (N,), class ids.
        known_as: fingerprint of the files that they were decoded from; None where there are none.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    known_as: str | None = None

    @property
    def chans(self) -> int:
        """Colour channels."""
        return self.images.shape[3]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])

    def take(self, indices: NDArray[np.int64]) -> ImageArrays:
        """The images at `indices`."""
        return ImageArrays(self.images[indices], self.labels[indices])

    def fingerprint(self) -> str:
        """What tells these images and labels from any others: of their files, else of the pixels."""
        return self.known_as or digest(self.labels, np.ascontiguousarray(self.images).data)


def to_pil(image: NDArray[np.uint8]) -> Image.Image:
    """An image (H, W, C) as Pillow's."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def to_pixels(image: Image.Image, chans: int) -> NDArray[np.uint8]:
    """Pillow's image of any mode as (H, W, 1), grey, where `chans` is 1, else as (H, W, 3), RGB.

    As torchvision and timm load them (`convert`): transparency is dropped, a rotation noted in EXIF is not carried out. Pillow would
    cut 16-bit grey off at 255, which turns most of an image white; here it is scaled.

    Raises:
        ValueError: pixels of 32 bits, whose range a file does not say.
    """
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 2**16 - 1:
            raise ValueError(
                f"it has 32 bits per pixel (mode {image.mode}) and no defined white level; save it with 8 or 16"
            )
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return np.asarray(image.convert("L" if chans == 1 else "RGB")).reshape(
        image.height, image.width, -1
    )


def open_file(path: str | os.PathLike[str]) -> Image.Image:
    """Pillow's image of a file; only its header is decoded."""
    return open_image(read_file(path))


def open_image(content: bytes) -> Image.Image:
    """Pillow's image of an encoded one; only its header is decoded."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def decode(opened: Callable[[], Image.Image], chans: int, name: str) -> NDArray[np.uint8]:
    """An image (H, W, C), grey where `chans` is 1, else RGB.

    Raises:
        ImageError: it cannot be opened or decoded; names it and the reason.
    """
    try:
        return to_pixels(opened(), chans)
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        reason = re.sub(
            r" <[^>]*>", "", " ".join(str(error).split())
        )  # not where an object lies in memory
        raise ImageError(f"{name} cannot be decoded ({reason})") from error


class EncodedImages(ABC):
    """Image files by index, wherever they are stored: all, or some rows of them. One is decoded each time it is needed.

    Args:
        labels: (N,), class ids.
        where: what holds them, for messages.
        settings: with `in_chans` and `on_error`. Skipped, an image is replaced by the next one that can be decoded, with the label of
            that one: always the same, so that the number of images, their order and their random draws stay what they are.
    """

    def __init__(self, labels: NDArray[np.int64], where: str, settings: DataSettings) -> None:
        if not len(labels):
            raise UsageError(f"{where}: holds no images")
        self.labels, self.where, self.rows, self.on_error = (
            labels,
            where,
            np.arange(len(labels)),
            settings.on_error,
        )
        self._failed = torch.zeros(
            len(labels), dtype=torch.bool
        ).share_memory_()  # by row; workers say it once, all together
        self.chans = 1 if settings.in_chans == 1 else 3

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
    def fingerprint(self) -> str:
        """What tells these images from any others wherever their folder lies: names below it, and labels; no image is read."""

    def row_bytes(self) -> bytes:
        """The rows as a fingerprint takes them."""
        return np.ascontiguousarray(self.rows, "<i8").tobytes()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image (H, W, C), grey where `in_chans` is 1, else RGB, and class id.

        Raises:
            ImageError: it cannot be decoded; names it and the reason. Under `skip`, none can.
        """
        for row in itertools.chain(range(index, len(self)), range(index)):
            try:
                return decode(partial(self.open, row), self.chans, self.name(row)), int(
                    self.labels[row]
                )
            except ImageError as error:
                if self.on_error == "raise":
                    raise ImageError(f"{error}; {SKIP}") from error
                if not self._failed[self.rows[row]]:
                    log.warning("data.on_error=skip: %s; the next image is used instead", error)
                    self._failed[self.rows[row]] = True
        raise ImageError(f"data.on_error=skip: {self.where}: no image can be decoded")


ImageSource = ImageArrays | EncodedImages


def load(encoded: EncodedImages, memory_mb: float = math.inf) -> ImageSource:
    """In memory where all images are of one size and fit into `memory_mb`, else decoded when needed."""
    images: list[NDArray[np.uint8]] = []
    labels = np.empty_like(encoded.labels)  # an image that is skipped has another one's
    for row in range(len(encoded)):
        image, labels[row] = encoded[row]
        if (
            image.nbytes * len(encoded) > memory_mb * 1e6
            or image.shape != (images or [image])[0].shape
        ):
            return encoded
        images.append(image)
    return ImageArrays(np.stack(images), labels)


def _are_same(one: ImageSource, other: ImageSource) -> bool:
    """Whether two splits have the same labels in the same order and, in a sample, the same pixels: a copy, or a link."""
    if not np.array_equal(one.labels, other.labels):
        return False
    try:
        return all(
            np.array_equal(one[i][0], other[i][0])
            for i in range(0, len(one), len(one) // SAMPLE or 1)
        )
    except ImageError:  # which a run shows that needs the image
        return False


def resize_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """An image (H, W, C) as (size, size, C), bicubic, its proportions lost."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(to_pil(image).resize((size, size), Image.Resampling.BICUBIC)).reshape(
        size, size, image.shape[2]
    )


def stratified_split(
    labels: NDArray[np.int64], held_out: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the kept and the held-out images, class shares equal, always the same for the same labels."""
    from sklearn.model_selection import (
        train_test_split,  # with pandas half a second, and most photos come with their splits
    )

    try:
        kept, out = train_test_split(
            np.arange(len(labels)), test_size=held_out, random_state=SPLIT_SEED, stratify=labels
        )
    except ValueError as error:
        raise UsageError(
            f"data: {held_out:.0%} of {len(labels)} train images cannot be held out ({error})"
        ) from error
    return np.sort(kept), np.sort(out)


def hold_out(splits: Mapping[str, Any]) -> dict[str, Any]:
    """The splits, `ImageArrays` or encoded images; where there is no val, a tenth of train is, always the same images.

    A split that is another one, as a copy or by a link, is named in a warning.
    """
    for one, other in itertools.combinations(splits, 2):
        if is_first() and _are_same(splits[one], splits[other]):
            log.warning(
                "data: %s and %s are the same images; accuracy on %s does not show how the model does on new images",
                one,
                other,
                other,
            )
    if "train" not in splits or "val" in splits:
        return dict(splits)
    kept, out = stratified_split(splits["train"].labels, HELD_OUT)
    return {**splits, "train": splits["train"].take(kept), "val": splits["train"].take(out)}
