"""The settings that all datasets share."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qat.errors import UsageError
from qat.launch.ranks import num_cores
from qat.utils.validate import (
    CROP_MODES,
    INTERPOLATIONS,
    MAX_CROP,
    MAX_IMAGE_SIDE,
    MIN_CROP,
    check_channels,
    check_choice,
    check_int,
    check_number,
)

_check_fraction = partial(check_number, lowest=0, highest=1)
# Checks of single settings, with bounds or choices. Some bounds catch typing mistakes that would
# require more processes or pixels than a machine can handle.
CHECKS: dict[str, tuple[Any, ...]] = {
    "on_error": (check_choice, ("raise", "skip")),
    "crop_mode": (check_choice, CROP_MODES),
    "augment": (check_choice, ("none", "light", "timm")),
    "train_interpolation": (check_choice, ("random", "nearest", "bilinear", "bicubic")),
    "interpolation": (check_choice, INTERPOLATIONS),
    "image_size": (check_int, 1, MAX_IMAGE_SIDE),
    "patch_size": (check_int, 1, MAX_IMAGE_SIDE),
    "in_chans": (check_int, 1),
    "num_classes": (check_int, 1),
    "batch_size": (check_int, 1),
    "num_workers": (check_int, 0, 256),
    "calibration_images": (check_int, 1),
    "seed": (check_int, 0),
    "repeats": (check_int, 1, 1000),
    "mixup_off_epoch": (check_int, 0),
    "shift": (check_int, 0),
    "memory_mb": (check_number, 0),
    "mixup": (check_number, 0),
    "cutmix": (check_number, 0),
    "hflip": (_check_fraction,),
    "random_erasing": (_check_fraction,),
    "mixup_prob": (_check_fraction,),
    "mixup_switch_prob": (_check_fraction,),
    "crop_pct": (partial(check_number, lowest=MIN_CROP, highest=MAX_CROP),),
}
MAY_BE_NONE = {"interpolation", "crop_pct", "crop_mode", "patch_size", "shift", "num_workers"}
# With fewer images, `num_workers=None` means no worker processes.
MIN_IMAGES_FOR_WORKERS = 1000
MAX_WORKERS = 8


@dataclass(frozen=True)
class DataSettings:
    """The settings of `data/*.yaml`.

    "Photos: None = from `model`" means that datasets of image files take the value from the
    pretrained config of `model`, or else ImageNet's value.

    Attributes:
        image_size: height and width in pixels, to which images are resized or cropped.
        patch_size: patch size of the model for images of `image_size`; None = the model's own.
        in_chans: number of colour channels.
        num_classes: number of classes.
        mean: mean per channel of pixel values in [0, 1]; photos: None = from `model`.
        std: standard deviation per channel of pixel values in [0, 1]; photos: None = from `model`.
        batch_size: images of a batch in each process.
        num_workers: loader processes; None = see `workers`.
        augment: `none` (images as in evaluation, no `repeats`), `light` (shifted crop and
            flip; if `crop_pct` is set, random resized crop and flip) or `timm` (random resized
            crop, flip and the settings below). `mixup` and `cutmix` do not depend on it.
        hflip: probability of a horizontal flip with `light` and `timm`; use 0 if left and right
            matter.
        shift: maximum shift in pixels with `light`, if `crop_pct` is None; None = an eighth of
            `image_size`, 0 = only flips.
        scale: lowest and highest area of a random resized crop, as fractions of the image's area;
            for `timm`, and for `light` if `crop_pct` is set.
        rand_augment: timm's string (`rand-...`, `augmix-...`, `original`, `v0`, `3a` ...); None =
            off; `timm` only.
        color_jitter: range of factors of brightness, contrast and saturation: one number, a list of
            three, or with hue a list of four; None = off. `timm` only, and only if `rand_augment`
            is None or contains `3a`.
        random_erasing: probability that a rectangle is filled with noise; `timm` only.
        train_interpolation: interpolation of the random resized crop; `random` = bilinear or
            bicubic, chosen at random; `timm` only.
        repeats: number of times that an image appears in an epoch, each time augmented differently.
            The length of an epoch does not change: with `repeats` = n, an epoch contains one n-th
            of the images.
            Source: Hoffer et al., "Augment Your Batch", CVPR 2020; DeiT uses 3.
        mixup: alpha of mixup (arXiv 1710.09412), which blends pairs of images in a batch and their
            classes; 0 = off.
        cutmix: alpha of cutmix (arXiv 1905.04899), which copies a rectangle of one image of a pair
            into the other image; 0 = off.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability of cutmix if both are on.
        mixup_off_epoch: first epoch in which no batch is mixed; 0 = mixing never ends.
        calibration_images: number of images from which scales are initialized.
        seed: seed of order, augmentation, mixing and calibration images.
        root: path of the data.
        on_error: reaction to an image that cannot be decoded: `raise` ends the run, `skip` warns
            and uses the next image instead or, in a prediction, leaves the image out.
        memory_mb: maximum size in megabytes of the decoded images of a split in memory. The images
            of a larger split, and images of different sizes, are decoded when needed.
        crop_pct: side of the centre crop in evaluation, as a fraction of the shorter side (of the
            square, if `crop_mode` makes one), before scaling to `image_size`; None = the whole
            image is resized to a square; photos: None = from `model`.
        crop_mode: used if `crop_pct` is set. `center` crops the centre; `center_floor` also rounds
            the corner of the crop down, as in Transformers; `squash` first resizes the whole image
            to a square; `border` first pads the image to a square; None = `center`; photos: None =
            from `model`.
        interpolation: interpolation in evaluation and with `light`, if `crop_pct` is set; None =
            bicubic; photos: None = from `model`.
        image_column: column with encoded images; None = a usual name such as `image`.
        label_column: column with labels; None = a usual name such as `label`.
        model: timm name of the model whose pretrained config supplies the values marked `photos`
            that are None.

    Raises:
        UsageError: a setting is invalid.
    """

    image_size: int
    patch_size: int | None
    in_chans: int
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int = 64
    num_workers: int | None = None
    augment: str = "none"
    hflip: float = 0.5
    shift: int | None = None
    scale: Sequence[float] = (0.08, 1.0)
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float | Sequence[float] | None = None
    random_erasing: float = 0.25
    train_interpolation: str = "random"
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0
    calibration_images: int = 256
    seed: int = 0
    root: str | None = None
    on_error: str = "raise"
    memory_mb: float = 4096
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        for name, (check, *bounds) in CHECKS.items():
            value = getattr(self, name)
            if value is not None or name not in MAY_BE_NONE:
                check(f"data.{name}", value, *bounds)
        if not _is_area_range(self.scale):
            raise UsageError(
                f"data.scale={self.scale!r}: "
                "must be two fractions of the image's area [lowest, highest], above 0 to 1"
            )
        for name, lowest in (("mean", -math.inf), ("std", 0.0)):
            check_channels(f"data.{name}", getattr(self, name), self.in_chans, lowest)

    def workers(self, images: int) -> int:
        """Number of loader processes for a number of images.

        The number is `num_workers` if set. The default is 0 for few images, which load faster
        without worker processes; else the number of cores that each process of the run has on this
        machine, at most `MAX_WORKERS`.
        """
        if self.num_workers is not None:
            return self.num_workers
        if images < MIN_IMAGES_FOR_WORKERS:
            return 0
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(max(num_cores() // local_processes, 1), MAX_WORKERS)

    @property
    def mixes(self) -> bool:
        """True if mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0


def _is_area_range(scale: Any) -> bool:
    """True for a pair [lowest, highest] with 0 < lowest <= highest <= 1."""
    if not isinstance(scale, Sequence) or len(scale) != 2:
        return False
    if not all(isinstance(fraction, int | float) for fraction in scale):
        return False
    lowest, highest = scale
    return 0 < lowest <= highest <= 1
