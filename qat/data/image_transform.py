"""What evaluation does to one image from anywhere: a file, Pillow's image or an array."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qat.data.image_data import ImageData
from qat.data.settings import DataSettings
from qat.data.sources import decode, open_file, to_pil
from qat.data.transforms import eval_transform
from qat.errors import UsageError

AnyImage = Image.Image | NDArray[np.uint8] | str | Path


def image_transform(settings: DataSettings | Mapping[str, Any]) -> Callable[[AnyImage], Tensor]:
    """A function from an image of any size to the tensor (C, H, W), float32, on which a net is evaluated.

    It takes a path, Pillow's image, or an array (H, W), (H, W, 1) or (H, W, 3) of uint8; colours become grey or grey RGB where the
    net wants that. It raises `UsageError` for anything else, and for a file that cannot be decoded.

    Args:
        settings: of a dataset (`data.settings`), or a data config as checkpoints hold it: a mapping with `_target_`, of which no code
            is imported, or without it, of plain settings.

    Raises:
        UsageError: the settings cannot work, or `_target_` is a dataset that is not known here.
    """
    known = settings if isinstance(settings, DataSettings) else data_settings(settings)
    if known.in_chans not in {1, 3}:
        raise UsageError(
            f"data.in_chans={known.in_chans}: must be 1 or 3, the channels of an image"
        )
    transform = eval_transform(known)
    return lambda image: transform(_pixels(image, known))


def data_settings(config: Mapping[str, Any]) -> DataSettings:
    """Complete settings of a data config as checkpoints hold it; see `image_transform`."""
    target = str(config.get("_target_", "qat.data.ImageData"))
    module, _, name = target.rpartition(".")
    dataset = getattr(sys.modules.get(module), name, None)
    if not (isinstance(dataset, type) and issubclass(dataset, ImageData)):
        raise UsageError(
            f"data._target_={target!r}: must be a dataset of qat or of an imported module; import it, or pass its settings"
        )
    return dataset.complete({key: value for key, value in config.items() if key != "_target_"})


def _pixels(image: AnyImage, settings: DataSettings) -> NDArray[np.uint8]:
    """(H, W, in_chans)."""
    if isinstance(image, str | Path):
        return decode(functools.partial(open_file, image), settings.in_chans, str(image))
    kind = (
        f"{image.dtype} array {image.shape}"
        if isinstance(image, np.ndarray)
        else type(image).__name__
    )
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim in {2, 3}
        and image[..., None].shape[2] in {1, 3}
    ):
        image = to_pil(np.atleast_3d(image))
    if not isinstance(image, Image.Image):
        raise UsageError(
            f"image of type {kind}: must be a path, Pillow's image, or an array (H, W[, 1 or 3]) of uint8"
        )
    return decode(lambda: image, settings.in_chans, f"image of type {kind}")
