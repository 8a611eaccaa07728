"""From decoded pixels to normalised tensors, and mixing of batches; augmentation is torchvision's and timm's.

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
from torchvision.transforms import v2

from qat.data.sampler import isolated_rng
from qat.data.settings import DataSettings
from qat.data.sources import resize_square, to_pil
from qat.errors import UsageError

# Keeps the draws of mixing apart from those of augmentation, whose numbers are (seed, epoch, index).
STREAM = 0x6D6978


@dataclass(frozen=True)
class Transform:
    """Maps an image (H, W, C) uint8 to (C, H, W) float32.

    Attributes:
        apply: what is done to one image.
        is_random: True if that draws random numbers.
        finish: what is done after it, to one image or at once to a batch (..., C, H, W), with the same result; None = nothing.
    """

    apply: Callable[[NDArray[np.uint8]], Tensor]
    is_random: bool = False
    finish: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Transform one image."""
        image_or_pixels = self.apply(image)
        return image_or_pixels if self.finish is None else self.finish(image_or_pixels)


def _to_tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)


def _normalise(settings: DataSettings) -> Callable[[Tensor], Tensor]:
    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(settings.mean), list(settings.std), inplace=True),
    ])


def eval_transform(settings: DataSettings) -> Transform:
    """Everything that evaluation does to an image of any size and the right channels.

    It is squeezed into the square, or with a `crop_pct` scaled and cropped by timm; then scaled to [0, 1] and normalised.
    """
    if settings.crop_pct is None:
        return Transform(
            v2.Compose([partial(resize_square, size=settings.image_size), _to_tensor]),
            finish=_normalise(settings),
        )
    interpolation = settings.interpolation or "bicubic"
    scaled = _timm_transform(
        settings,
        crop_pct=settings.crop_pct,
        crop_mode=settings.crop_mode,
        interpolation=interpolation,
    )
    return Transform(v2.Compose([to_pil, scaled]))


def train_transform(settings: DataSettings) -> Transform:
    """The evaluation transform after the augmentation that the settings ask for."""
    if settings.augment == "none":
        return eval_transform(settings)
    squeeze = (
        [partial(resize_square, size=settings.image_size)] if settings.crop_pct is None else []
    )
    if settings.augment == "light" and squeeze:
        shift = max(settings.image_size // 8, 1) if settings.shift is None else settings.shift
        crop = [v2.RandomCrop(settings.image_size, padding=shift)] if shift else []
        shifted = v2.Compose([*squeeze, _to_tensor, *crop, v2.RandomHorizontalFlip(settings.hflip)])
        return Transform(shifted, is_random=True, finish=_normalise(settings))
    options: dict[str, Any] = {
        "color_jitter": None,
        "interpolation": settings.interpolation or "bicubic",
    }
    if settings.augment == "timm":
        options = {
            "auto_augment": settings.rand_augment,
            "color_jitter": settings.color_jitter,
            "re_prob": settings.random_erasing,
            "re_mode": "pixel",
            "interpolation": settings.train_interpolation,
        }
    augmentation = _timm_transform(
        settings, is_training=True, hflip=settings.hflip, scale=tuple(settings.scale), **options
    )
    for step in augmentation.transforms:
        for operation in itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.magnitude_max is None:
                # A level of exactly 10 would draw at the very end of each range; only a string's own `mmax` goes there and beyond.
                operation.magnitude_max = math.nextafter(10, 0)
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return Transform(v2.Compose([*squeeze, to_pil, augmentation]), is_random=True)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Pillow refuses to keep no bit at all, which timm asks for at one end of the levels."""
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))


def _timm_transform(settings: DataSettings, **options: Any) -> Any:
    size = (settings.in_chans, settings.image_size, settings.image_size)
    return timm.data.create_transform(
        size, mean=tuple(settings.mean), std=tuple(settings.std), **options
    )


class BatchMixup:
    """Blends each image of a batch with the one opposite (first with last), and their classes.

    Smoothing of labels is the loss's: cross-entropy smooths probabilities as timm smooths one-hot classes.

    Args:
        settings: with `mixup*`, `cutmix`, `num_classes` and `seed`.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.seed, self.off_epoch = settings.seed, settings.mixup_off_epoch
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
        """Mix one batch; `images` stays as it is.

        Args:
            images: (B, C, H, W), float, B even.
            target: (B,), class ids.
            epoch: that is under way.
            step: number of the batch since training began.
            rank: of the process.

        Returns:
            Images of the same dtype and probabilities (B, K), float32; the arguments themselves in an epoch without mixing.

        Raises:
            UsageError: B is odd.
        """
        if self.off_epoch and epoch >= self.off_epoch:
            return images, target
        if len(images) % 2:  # where there are fewer training images than `batch_size`
            raise UsageError(
                f"data.mixup, data.cutmix: pairs are mixed; the number of images must be even, a batch has {len(images)}"
            )
        exact = torch.promote_types(
            images.dtype, torch.float32
        )  # timm gives shares of classes the dtype of the images
        with isolated_rng(self.seed, step, rank, STREAM):
            mixed, shares = self._mixup(images.to(exact, copy=True), target)
        return mixed.to(images.dtype), shares
