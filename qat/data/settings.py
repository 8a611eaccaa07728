"""The knobs that all datasets share."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qat.errors import UsageError
from qat.utils.validate import (
    CROP_MODES,
    HIGHEST_CROP,
    INTERPOLATIONS,
    LOWEST_CROP,
    MOST_SIDE,
    check_channels,
    check_choice,
    check_int,
    check_number,
)

_share = partial(check_number, lowest=0, highest=1)
# Of integers the lowest, and the highest where a typing mistake would ask for more processes or pixels than a machine survives.
CHECKS: dict[str, tuple[Any, ...]] = {
    "on_error": (check_choice, ("raise", "skip")),
    "crop_mode": (check_choice, CROP_MODES),
    "augment": (check_choice, ("none", "light", "timm")),
    "train_interpolation": (check_choice, ("random", "nearest", "bilinear", "bicubic")),
    "interpolation": (check_choice, INTERPOLATIONS),
    "image_size": (check_int, 1, MOST_SIDE),
    "patch_size": (check_int, 1, MOST_SIDE),
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
    "hflip": (_share,),
    "random_erasing": (_share,),
    "mixup_prob": (_share,),
    "mixup_switch_prob": (_share,),
    "crop_pct": (partial(check_number, lowest=LOWEST_CROP, highest=HIGHEST_CROP),),
}
MAY_BE_NONE = {"interpolation", "crop_pct", "crop_mode", "patch_size", "shift", "num_workers"}
FEW_IMAGES, MOST_WORKERS = 1000, 8


@dataclass(frozen=True)
class DataSettings:
    """The knobs of `data/*.yaml`.

    Attributes:
        image_size: height and width in pixels; images of another size are resized.
        patch_size: patch of the model for images of this size; None = the model's own.
        in_chans: colour channels.
        num_classes: number of classes.
        mean: per channel, of pixel values in [0, 1]; photos: None = that of `model`.
        std: per channel, of pixel values in [0, 1]; photos: None = that of `model`.
        batch_size: images per process and step.
        num_workers: loader processes; None = see `workers`.
        augment: `none` (all that follows is off, `repeats` too), `light` (shifted crop, flip; with a `crop_pct` random resized crop, flip)
            or `timm` (random resized crop, flip and what follows).
        hflip: probability of a horizontal flip under `light` and `timm`; 0 where left and right matter.
        shift: pixels by which `light` shifts an image at most, without a `crop_pct`; None = an eighth of `image_size`, 0 = flips alone.
        scale: lowest and highest area of a random resized crop as shares of the image's; under `timm`, and `light` with a `crop_pct`.
        rand_augment: timm's string (`rand-...`, `augmix-...`, `original`, `v0`, `3a` ...); None = off; `timm` only.
        color_jitter: range of factors of brightness, contrast and saturation: one number, or a list of three or with hue four; None =
            off; `timm` only, and there only where `rand_augment` is None or has `3a` in it: timm leaves it out beside the others.
        random_erasing: probability that a rectangle is filled with noise; `timm` only.
        train_interpolation: of the random resized crop; `random` = bilinear or bicubic by chance; `timm` only.
        repeats: how often an image appears in the order of an epoch, each time augmented anew, while the epoch's length stays: it then sees
            one image in `repeats`. Source: Hoffer et al., "Augment Your Batch", CVPR 2020; DeiT has 3.
        mixup: alpha of mixup (arXiv 1710.09412), pairs of images of a batch blended, their classes too; 0 = off.
        cutmix: alpha of cutmix (arXiv 1905.04899), a rectangle from the other image; 0 = off.
        mixup_prob: probability that a batch is mixed at all.
        mixup_switch_prob: probability of cutmix where both are on.
        mixup_off_epoch: nothing is mixed from this epoch on; 0 = always mixed.
        calibration_images: images from which scales are initialised.
        seed: of order, augmentation and calibration images.
        root: folder with the data.
        on_error: what an image does that cannot be decoded: `raise` ends the run, `skip` warns and takes the next image in its place.
        memory_mb: a split that would take more megabytes once decoded, or has images of different sizes, is decoded when needed.
        crop_pct: side of evaluation's centre crop as a share of the shorter side, before scaling to `image_size`; None = the whole image
            is squeezed into the square when read; photos: None = that of `model`.
        crop_mode: where there is a `crop_pct`: `center` crops, `squash` first makes a square of the whole image, `border` pads it to one;
            None = `center`; photos: None = that of `model`.
        interpolation: of evaluation's and `light`'s scaling where there is a `crop_pct`; photos: None = that of `model`.
        image_column: parquet column with encoded images; None = found by its usual names.
        label_column: parquet column with labels; None = found by its usual names.
        model: timm name whose pretrained config says what photos leave None.
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
            if (value := getattr(self, name)) is not None or name not in MAY_BE_NONE:
                check(f"data.{name}", value, *bounds)
        scale = self.scale if isinstance(self.scale, Sequence) else ()
        if [isinstance(share, int | float) for share in scale] != [True, True] or not 0 < scale[
            0
        ] <= scale[1] <= 1:
            raise UsageError(
                f"data.scale={self.scale!r}: must be two shares of the image's area [lowest, highest], above 0 to 1"
            )
        for name, lowest in (("mean", -math.inf), ("std", 0.0)):
            check_channels(f"data.{name}", getattr(self, name), self.in_chans, lowest)

    def workers(self, images: int) -> int:
        """`num_workers`, or as the machine has cores for each of a run's processes on it; for few images none, which start sooner."""
        if self.num_workers is not None:
            return self.num_workers
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )  # of a task of srun its own
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1
        return 0 if images < FEW_IMAGES else min(share, MOST_WORKERS)

    @property
    def mixes(self) -> bool:
        """True if batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0
