"""From decoded pixels to normalised tensors; augmentation is torchvision's and timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from qat.data.arrays import resize_square, to_pil
from qat.data.auto_augment import restrict_to_pillow
from qat.data.settings import DataSettings


@dataclass(frozen=True)
class Transform:
    """Maps an image (H, W, C) uint8 to (C, H, W) float32.

    Attributes:
        apply: what is done to one image.
        is_random: True if that draws random numbers.
        finish: what is done behind it, to one image or at once to a batch (..., C, H, W), with the same result; None = nothing.
    """

    apply: Callable[[NDArray[np.uint8]], Tensor]
    is_random: bool = False
    finish: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Transform one image."""
        image_or_pixels = self.apply(image)
        return image_or_pixels if self.finish is None else self.finish(image_or_pixels)

    def finished(self, images: list[Tensor]) -> list[Tensor]:
        """What `__call__` makes of images of which each went through `apply`."""
        return images if self.finish is None else list(self.finish(torch.stack(images)))


def _to_tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)


def _square(settings: DataSettings) -> list[Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]:
    """What comes first where there is no `crop_pct`: any image as a square of the settings' size."""
    return [partial(resize_square, size=settings.image_size)] if settings.crop_pct is None else []


def _normalise(settings: DataSettings) -> Callable[[Tensor], Tensor]:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(settings.mean), list(settings.std), inplace=True)])


def eval_transform(settings: DataSettings) -> Transform:
    """Everything that evaluation does to an image of any size and the right channels.

    It is squeezed into the square, or with a `crop_pct` scaled and cropped by timm; then scaled to [0, 1] and normalised.
    """
    if settings.crop_pct is None:
        return Transform(v2.Compose([*_square(settings), _to_tensor]), finish=_normalise(settings))
    scaling = {"crop_pct": settings.crop_pct, "interpolation": settings.interpolation or "bicubic"}
    return Transform(v2.Compose([to_pil, _timm_transform(settings, **scaling)]))


def train_transform(settings: DataSettings) -> Transform:
    """The evaluation transform behind the augmentation that the settings ask for."""
    if settings.augment == "none":
        return eval_transform(settings)
    return _light(settings) if settings.augment == "light" else _timm(settings)


def _light(settings: DataSettings) -> Transform:
    size = settings.image_size
    if settings.crop_pct is None:
        shift = max(size // 8, 1) if settings.shift is None else settings.shift
        crop = [v2.RandomCrop(size, padding=shift)] if shift else []
        shifted = v2.Compose([*_square(settings), _to_tensor, *crop, v2.RandomHorizontalFlip(settings.hflip)])
        return Transform(shifted, is_random=True, finish=_normalise(settings))
    interpolation = settings.interpolation or "bicubic"
    crop_and_flip = _timm_training(settings, color_jitter=None, interpolation=interpolation)
    return Transform(v2.Compose([to_pil, crop_and_flip]), is_random=True)


def _timm(settings: DataSettings) -> Transform:
    augmentation = _timm_training(
        settings,
        auto_augment=settings.rand_augment,
        color_jitter=settings.color_jitter,
        re_prob=settings.random_erasing,
        re_mode=settings.erase_mode,
        re_count=settings.erase_count,
        interpolation=settings.train_interpolation,
    )
    return Transform(v2.Compose([*_square(settings), to_pil, restrict_to_pillow(augmentation)]), is_random=True)


def _timm_training(settings: DataSettings, **options: Any) -> Any:
    return _timm_transform(settings, is_training=True, hflip=settings.hflip, scale=tuple(settings.scale), **options)


def _timm_transform(settings: DataSettings, **options: Any) -> Any:
    size = (settings.in_chans, settings.image_size, settings.image_size)
    return timm.data.create_transform(size, mean=tuple(settings.mean), std=tuple(settings.std), **options)
