"""Image files (JPEG, PNG ...) wherever they are stored: decoded at once or when needed, and what happens where one cannot be."""

from __future__ import annotations

import copy
import io
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qat.data.arrays import MEGABYTE, ImageArrays, ImageSource, hold_out, to_pixels
from qat.data.image_data import ImageData
from qat.data.settings import DataSettings
from qat.errors import UsageError

log = logging.getLogger(__name__)

# Pillow would have a PostScript file run by Ghostscript, whatever its name.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
NAMED_AT_MOST = 20
# Of images that are decoded when needed so many are tried before a run begins: some seconds.
TRIED_AT_MOST = 1000
SKIP = "data.on_error=skip leaves out what cannot be decoded"
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.9, "interpolation": "bicubic"}


class ImageError(UsageError):
    """An image cannot be decoded.

    A loader's worker process sends an exception as text with a traceback, whose last line is the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


def open_image(content: bytes) -> Image.Image:
    """Pillow's image of an encoded one; only its header is decoded."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


class EncodedImages(ABC):
    """Image files by index, wherever they are stored: all, or some rows of them. One is decoded each time it is needed.

    Under `data.on_error=skip` an image that cannot be decoded is replaced by the next one that can, with the label of that one: always the
    same, so that the number of images, their order and their random draws stay what they are.

    Args:
        labels: (N,), class ids.
        where: what holds them, for messages.
        settings: with `in_chans` and `on_error`.
    """

    def __init__(self, labels: NDArray[np.int64], where: str, settings: DataSettings) -> None:
        self.labels, self.where, self.on_error = labels, where, settings.on_error
        self.chans = 1 if settings.in_chans == 1 else 3
        self._choose(np.arange(len(labels)))

    def _choose(self, rows: NDArray[np.int64]) -> None:
        # Shared with the loader's worker processes, so that a file is named once and not once for each of them.
        self.rows, self.failed = rows, torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def take(self, indices: NDArray[np.int64]) -> Self:
        """The images at `indices`."""
        taken = copy.copy(self)
        taken.labels = self.labels[indices]
        taken._choose(self.rows[indices])
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

    @property
    def left_out(self) -> int:
        """How many images turned out so far, in any of the loader's processes, to be such that they cannot be decoded."""
        return int(self.failed.sum())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image (H, W, C) and class id.

        Raises:
            ImageError: it cannot be decoded; under `skip`, none can.
        """
        for row in itertools.chain(range(index, len(self)), range(index)):
            if self.failed[row]:
                continue
            try:
                return self.decode(row), int(self.labels[row])
            except ImageError as error:
                if self.on_error == "raise":
                    raise ImageError(f"{error}; {SKIP}") from error
                self.failed[row] = True
                log.warning("data.on_error=skip: %s; the next image replaces it (%d so far)", error, self.left_out)
        raise ImageError(f"data.on_error=skip: none of {len(self)} images can be decoded")

    def decode(self, index: int) -> NDArray[np.uint8]:
        """One image (H, W, C), grey where `in_chans` is 1, else RGB.

        Raises:
            ImageError: it cannot be decoded; names it and the reason.
        """
        try:
            return to_pixels(self.open(index), self.chans)
        except Exception as error:  # on damaged files Pillow's readers raise nearly anything
            is_unknown = isinstance(error, UnidentifiedImageError)
            why = "it begins like no known image format" if is_unknown else " ".join(f"{error}".split())
            raise ImageError(f"{self.name(index)} cannot be decoded ({why})") from error


def load(encoded: EncodedImages, settings: DataSettings) -> ImageSource:
    """In memory where all images are of one size and fit into `memory_mb`, else decoded when needed.

    Raises:
        ImageError: images cannot be decoded and are not to be skipped; names them together.
        UsageError: none can be decoded.
    """
    images: list[NDArray[np.uint8]] = []
    failed, is_held = [], True
    for row in range(len(encoded)):
        try:
            image = encoded.decode(row)
        except ImageError as error:
            failed.append(str(error))
            encoded.failed[row] = True
            continue
        if is_held and image.nbytes * len(encoded) <= settings.memory_mb * MEGABYTE and image.shape == (images or [image])[0].shape:
            images.append(image)
            continue
        is_held, images = False, []
        if len(encoded) > TRIED_AT_MOST:
            break
    if failed and settings.on_error == "raise":
        named = "; ".join(failed[:NAMED_AT_MOST]) + (" ..." if len(failed) > NAMED_AT_MOST else "")
        raise ImageError(f"{len(failed)} of {len(encoded)} images: {named}; {SKIP}")
    if len(failed) == len(encoded):
        raise UsageError(f"{encoded.where}: none of {len(encoded)} images can be decoded")
    for line in failed:
        log.warning("data.on_error=skip: left out %s", line)
    return ImageArrays(np.stack(images), encoded.labels[~encoded.failed.numpy()], len(failed)) if is_held else encoded


class EncodedImageData(ImageData):
    """Base of datasets of image files: of any size, scaled and cropped as the model's pretrained weights expect it.

    Args:
        settings: fields of `DataSettings`; None in `mean`, `std`, `crop_pct` and `interpolation` = that of `model`.

    Raises:
        UsageError: a value that cannot work, or `num_classes` is None: the line says how many the data have.
    """

    def __init__(self, **settings: Any) -> None:
        is_unset = settings.get("num_classes", 0) is None
        super().__init__(**settings | ({"num_classes": 1} if is_unset else {}))
        if is_unset:  # the model is built from the config, so the number has to stand there, not only here
            found = self.count_classes()
            raise UsageError(
                f"data.num_classes is not set: data.root={self.settings.root!r} has {found} classes; set data.num_classes={found}"
            )

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> DataSettings:
        """The settings; None in `mean`, `std`, `crop_pct` and `interpolation` = that of `model`, else ImageNet's usual values."""
        config = timm.get_pretrained_cfg(settings["model"]) if settings.get("model") else None
        values = {name: getattr(config, name, None) or usual for name, usual in IMAGENET.items() if settings.get(name) is None}
        if values and config is None:
            names = ", ".join(f"data.{name}" for name in values)
            log.warning("%s: null, and data.model=%r has no pretrained config: ImageNet's usual values", names, settings.get("model"))
        if settings.get("in_chans") == 1:
            values |= {name: [sum(values[name]) / len(values[name])] for name in {"mean", "std"} & set(values)}
        return super().complete({**settings, **values})

    def read(self) -> dict[str, ImageSource]:
        """All splits that there are; without val a tenth of train is held out."""
        found: dict[str, ImageSource] = {}
        for split, images in hold_out(self.encoded()).items():
            source = load(images, self.settings)
            found[split] = replace(source, known_as=images.fingerprint()) if isinstance(source, ImageArrays) else source
        return found

    @abstractmethod
    def encoded(self) -> Mapping[str, EncodedImages]:
        """The splits as they are stored."""

    def count_classes(self) -> int:
        """How many classes the data have: the highest label of their first split plus one."""
        return int(next(iter(self.encoded().values())).labels.max(initial=-1)) + 1
