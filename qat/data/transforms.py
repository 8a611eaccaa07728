"""Transforms from pixels to normalized tensors, with augmentation, and mixing of batches.

Papers: mixup arXiv 1710.09412, cutmix arXiv 1905.04899.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.mixup import Mixup
from torch import Tensor
from torchvision.transforms import CenterCrop, v2

from qat.data.sampler import isolated_rng
from qat.data.settings import DataSettings
from qat.data.sources import resize_square, to_pil
from qat.errors import UsageError

# Part of the seed of mixing, so that its random draws differ from those of augmentation, which are
# seeded by (seed, epoch, index).
MIXING_STREAM = 0x6D6978


@dataclass(frozen=True)
class Transform:
    """Maps an image (H, W, C) uint8 to (C, H, W) float32.

    Attributes:
        apply: first step, on one image.
        is_random: True if `apply` draws random numbers.
        finish: second step, on one image or a batch (..., C, H, W); the result for an image does
            not depend on the batch. None = no second step.
    """

    apply: Callable[[NDArray[np.uint8]], Tensor]
    is_random: bool = False
    finish: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Transform one image."""
        tensor = self.apply(image)
        return tensor if self.finish is None else self.finish(tensor)


def _to_tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)


def _make_normalization(settings: DataSettings) -> Callable[[Tensor], Tensor]:
    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(settings.mean), list(settings.std), inplace=True),
    ])


def eval_transform(settings: DataSettings) -> Transform:
    """Preprocessing for evaluation, for an image of any size with `in_chans` channels.

    The image is resized to a square or, if `crop_pct` is set, scaled and cropped as `crop_mode`
    says; then values are scaled to [0, 1] and normalized.
    """
    if settings.crop_pct is None:
        apply = v2.Compose([partial(resize_square, size=settings.image_size), _to_tensor])
        return Transform(apply, finish=_make_normalization(settings))
    preprocessing = _timm_transform(
        settings,
        crop_pct=settings.crop_pct,
        crop_mode=settings.crop_mode,
        interpolation=settings.interpolation or "bicubic",
    )
    if settings.crop_mode == "center_floor":
        # timm does not know this mode, and crops as for `center`.
        for index, step in enumerate(preprocessing.transforms):
            if isinstance(step, CenterCrop):
                preprocessing.transforms[index] = partial(_crop_floor, size=settings.image_size)
    return Transform(v2.Compose([to_pil, preprocessing]))


def _crop_floor(image: Image.Image, size: int) -> Image.Image:
    """Crop a square from the centre. Its corner is rounded down; torchvision rounds to nearest."""
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def train_transform(settings: DataSettings) -> Transform:
    """Preprocessing for training, with the augmentation of the settings."""
    if settings.augment == "none":
        return eval_transform(settings)
    if settings.augment == "light" and settings.crop_pct is None:
        return _light_augmentation(settings)
    if settings.augment == "timm":
        options: dict[str, Any] = {
            "auto_augment": settings.rand_augment,
            "color_jitter": settings.color_jitter,
            "re_prob": settings.random_erasing,
            "re_mode": "pixel",
            "interpolation": settings.train_interpolation,
        }
    else:
        options = {
            "color_jitter": None,
            "interpolation": settings.interpolation or "bicubic",
        }
    augmentation = _timm_transform(
        settings, is_training=True, hflip=settings.hflip, scale=tuple(settings.scale), **options
    )
    _limit_levels(augmentation)
    steps = [to_pil, augmentation]
    if settings.crop_pct is None:
        steps.insert(0, partial(resize_square, size=settings.image_size))
    return Transform(v2.Compose(steps), is_random=True)


def _light_augmentation(settings: DataSettings) -> Transform:
    """Augmentation `light` for images that are resized to a square."""
    shift = settings.shift
    if shift is None:
        shift = max(settings.image_size // 8, 1)
    steps: list[Any] = [partial(resize_square, size=settings.image_size), _to_tensor]
    if shift:
        steps.append(v2.RandomCrop(settings.image_size, padding=shift))
    steps.append(v2.RandomHorizontalFlip(settings.hflip))
    return Transform(v2.Compose(steps), is_random=True, finish=_make_normalization(settings))


def _limit_levels(augmentation: Any) -> None:
    """Keep the levels of timm's augmentation operations inside their ranges."""
    for step in augmentation.transforms:
        # RandAugment and AugMix have a list `ops`, AutoAugment has a list of lists `policy`.
        for operation in itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.magnitude_max is None:
                # timm stops at level 10. Stay just below, because at 10 Solarize changes nothing
                # and PosterizeIncreasing keeps no bits. `mmax` in `rand_augment` replaces the 10.
                operation.magnitude_max = math.nextafter(10, 0)
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep at least 1 bit per channel, because timm may ask for 0 bits, which Pillow refuses."""
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))


def _timm_transform(settings: DataSettings, **options: Any) -> Any:
    size = (settings.in_chans, settings.image_size, settings.image_size)
    return timm.data.create_transform(
        size, mean=tuple(settings.mean), std=tuple(settings.std), **options
    )


class BatchMixup:
    """Mixes opposite images of a batch (first with last) and their classes, at random.

    Labels are smoothed in the loss, not here: cross-entropy smooths probabilities as timm smooths
    one-hot classes.

    Args:
        settings: `mixup*`, `cutmix`, `num_classes` and `seed` are used.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.seed = settings.seed
        self.off_epoch = settings.mixup_off_epoch
        self._mixup = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            prob=settings.mixup_prob,
            switch_prob=settings.mixup_switch_prob,
            label_smoothing=0.0,
            num_classes=settings.num_classes,
        )

    def __call__(
        self, images: Tensor, target: Tensor, *, epoch: int, step: int, rank: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mix one batch, not in place.

        Args:
            images: (B, C, H, W), float, B even.
            target: (B,), class ids.
            epoch: the current epoch.
            step: number of the batch since training began.
            rank: number of the process.

        Returns:
            Images of the same dtype and probabilities (B, K), float32; in an epoch without mixing,
            the unchanged arguments.

        Raises:
            UsageError: B is odd in an epoch with mixing.
        """
        if self.off_epoch and epoch >= self.off_epoch:
            return images, target
        if len(images) % 2:  # with fewer training images than `batch_size`
            raise UsageError(
                "data.mixup, data.cutmix: images are mixed in pairs; "
                f"the number of images in a batch must be even, got {len(images)}"
            )
        # timm mixes in the dtype of the images and rounds several times, so use float32 at least.
        mixing_dtype = torch.promote_types(images.dtype, torch.float32)
        with isolated_rng(self.seed, step, rank, MIXING_STREAM):
            mixed_images, probabilities = self._mixup(images.to(mixing_dtype, copy=True), target)
        return mixed_images.to(images.dtype), probabilities
