"""Decoded images in memory, and what the rest of the package expects of any images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qat.errors import UsageError

# One fixed division into train, val and test: results of different runs and seeds are on the same images.
SPLIT_SEED, HELD_OUT = 0, 0.1
HIGHEST_16_BIT = 2**16 - 1
MEGABYTE = 10**6


class ImageSource(Protocol):
    """Images and labels by index, of one split; one with a method `fingerprint` says what tells them from any others."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,), class ids."""

    @property
    def chans(self) -> int:
        """Colour channels of every image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image (H, W, C) of any size and class id."""


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
        left_out: how many images could not be decoded and are not among these.
        known_as: fingerprint of the files that they were decoded from; None where there are none.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    left_out: int = 0
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
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > HIGHEST_16_BIT:
            raise ValueError(f"its pixels have 32 bits (mode {image.mode}), and what is white is not known; save it with 8 or 16")
        image = Image.fromarray(np.rint(values / (HIGHEST_16_BIT / 255)).astype(np.uint8))
    return np.asarray(image.convert("L" if chans == 1 else "RGB")).reshape(image.height, image.width, -1)


def resize_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """An image (H, W, C) as (size, size, C), bicubic, its proportions lost."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(to_pil(image).resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, image.shape[2])


def stratified_split(labels: NDArray[np.int64], held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the kept and the held-out images, class shares equal, always the same for the same labels.

    Raises:
        UsageError: there are too few images of a class.
    """
    from sklearn.model_selection import train_test_split  # with pandas half a second, and most photos come with their splits

    try:
        kept, out = train_test_split(np.arange(len(labels)), test_size=held_out, random_state=SPLIT_SEED, stratify=labels)
    except ValueError as error:
        raise UsageError(f"data.root: {held_out:.0%} of {len(labels)} images cannot be held out ({error})") from error
    return np.sort(kept), np.sort(out)


def hold_out(splits: Mapping[str, Any]) -> dict[str, Any]:
    """The splits, `ImageArrays` or encoded images; where there is no val, a tenth of train is, always the same images.

    Raises:
        UsageError: there are too few images of a class.
    """
    if "train" not in splits or "val" in splits:
        return dict(splits)
    kept, out = stratified_split(splits["train"].labels, HELD_OUT)
    return {**splits, "train": splits["train"].take(kept), "val": splits["train"].take(out)}
