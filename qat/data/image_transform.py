"""The evaluation transform for one image: a file, a Pillow image or an array."""

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
    """Build a function that turns an image of any size into a net's input, (C, H, W) float32.

    The function accepts a path, a Pillow image, or an array (H, W), (H, W, 1) or (H, W, 3) of
    uint8; it converts colours to grey, or grey to RGB, to match `in_chans`. The function raises
    `UsageError` for other arguments, and for images that cannot be decoded.

    Args:
        settings: settings of a dataset (`data.settings`), or the data config of a checkpoint: a
            mapping of settings, which may contain `_target_`. No code is imported for `_target_`.

    Raises:
        UsageError: a setting is missing or invalid, or `_target_` is an unknown dataset.
    """
    if not isinstance(settings, DataSettings):
        settings = data_settings(settings)
    if settings.in_chans not in {1, 3}:
        raise UsageError(
            f"data.in_chans={settings.in_chans}: must be 1 or 3, the channels of an image"
        )
    transform = eval_transform(settings)
    chans = settings.in_chans
    return lambda image: transform(_decode_pixels(image, chans))


def data_settings(config: Mapping[str, Any]) -> DataSettings:
    """Check the data config of a checkpoint, and add defaults; errors as for `image_transform`."""
    target = str(config.get("_target_", "qat.data.ImageData"))
    module, _, name = target.rpartition(".")
    dataset = getattr(sys.modules.get(module), name, None)
    if not isinstance(dataset, type) or not issubclass(dataset, ImageData):
        raise UsageError(
            f"data._target_={target!r}: must be a dataset of qat or of an imported module; "
            "import its module, or pass the settings of the dataset"
        )
    return dataset.complete({key: value for key, value in config.items() if key != "_target_"})


def _decode_pixels(image: AnyImage, chans: int) -> NDArray[np.uint8]:
    """The pixels of an image, (H, W, chans)."""
    if isinstance(image, str | Path):
        return decode(functools.partial(open_file, image), chans, str(image))
    description = type(image).__name__
    if isinstance(image, np.ndarray):
        description = f"{image.dtype} array {image.shape}"
        if _is_image_array(image):
            image = to_pil(np.atleast_3d(image))
    if not isinstance(image, Image.Image):
        raise UsageError(
            f"image of type {description}: "
            "must be a path, a Pillow image, or an array (H, W[, 1 or 3]) of uint8"
        )
    return decode(lambda: image, chans, f"image of type {description}")


def _is_image_array(array: NDArray[Any]) -> bool:
    """True for a uint8 array (H, W), (H, W, 1) or (H, W, 3)."""
    has_channels = array.ndim == 3 and array.shape[2] in {1, 3}
    return array.dtype == np.uint8 and (array.ndim == 2 or has_channels)
