"""From decoded pixels to normalised tensors; augmentation is torchvision's and timm's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from qat.data.arrays import to_pil

if TYPE_CHECKING:
    from qat.data.settings import DataSettings

AUGMENTATIONS = ("none", "light", "timm")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
RAND_AUGMENT_HIGHEST = 10
ERASE_PROBABILITY = 0.25


@dataclass(frozen=True)
class Transform:
    """Maps an image (H, W, C) uint8 to (C, H, W) float32.

    Attributes:
        apply: the mapping.
        is_random: True if it draws random numbers.
    """

    apply: Callable[[NDArray[np.uint8]], Tensor]
    is_random: bool = False

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Transform one image."""
        return self.apply(image)


def _to_tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def _normalise(settings: DataSettings) -> list[Callable[[Tensor], Tensor]]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(settings.mean), list(settings.std))]


def eval_transform(settings: DataSettings) -> Transform:
    """Scale to [0, 1] and normalise; with a `crop_pct` behind timm's scaling and centre crop."""
    if settings.crop_pct is None:
        return Transform(v2.Compose([_to_tensor, *_normalise(settings)]))
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
        crop = v2.RandomCrop(size, padding=max(size // 8, 1))
        return Transform(v2.Compose([_to_tensor, crop, v2.RandomHorizontalFlip(settings.hflip), *_normalise(settings)]), is_random=True)
    interpolation = settings.interpolation or "bicubic"
    crop_and_flip = _timm_transform(settings, is_training=True, hflip=settings.hflip, color_jitter=None, interpolation=interpolation)
    return Transform(v2.Compose([to_pil, crop_and_flip]), is_random=True)


def _timm(settings: DataSettings) -> Transform:
    timm_transform = _timm_transform(
        settings,
        is_training=True,
        hflip=settings.hflip,
        auto_augment=RAND_AUGMENT,
        re_prob=ERASE_PROBABILITY,
        re_mode="pixel",
        interpolation="random",
    )
    for step in timm_transform.transforms:
        for operation in getattr(step, "ops", ()):
            # At the very highest magnitude posterize would ask for 0 bits, which Pillow refuses.
            operation.magnitude_max = math.nextafter(RAND_AUGMENT_HIGHEST, 0)
    return Transform(v2.Compose([to_pil, timm_transform]), is_random=True)


def _timm_transform(settings: DataSettings, **options: Any) -> Any:
    size = (settings.in_chans, settings.image_size, settings.image_size)
    return timm.data.create_transform(size, mean=tuple(settings.mean), std=tuple(settings.std), **options)
