"""The knobs that all datasets share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qat.data.transforms import AUGMENTATIONS, INTERPOLATIONS
from qat.errors import UsageError
from qat.spec import check_choice, check_whole

ON_ERROR = ("raise", "skip")


@dataclass(frozen=True)
class DataSettings:
    """The knobs of `data/*.yaml`.

    Attributes:
        image_size: height and width in pixels; images of another size are resized.
        patch_size: patch of the model for images of this size; None = the model's own.
        in_chans: colour channels.
        num_classes: number of classes.
        mean: per channel, of pixel values in [0, 1]; photos: None = that of `model`.
        std: likewise.
        batch_size: images per process and step.
        num_workers: loader processes.
        augment: `none`, `light` (shifted crop, flip; with a `crop_pct` random resized crop, flip) or `timm` (RandAugment, random erasing).
        hflip: probability of a horizontal flip under `light` and `timm`; 0 where left and right matter.
        calibration_images: images from which scales are initialised.
        seed: of order, augmentation and calibration images.
        root: folder with the data.
        in_memory: False = decode an image each time it is needed; images of different sizes always are.
        on_error: what an image does that cannot be decoded: `raise` stops, `skip` warns and goes on without it.
        crop_pct: side of evaluation's centre crop as a share of the shorter side, before scaling to `image_size`; None = the whole image
            is squeezed into the square when read; photos: None = that of `model`.
        interpolation: of evaluation's and `light`'s scaling where there is a `crop_pct`; photos: None = that of `model`.
        image_column: parquet column with encoded images; None = found by its usual names.
        label_column: likewise, of labels.
        model: timm name whose pretrained config says what photos leave None.
    """

    image_size: int
    patch_size: int | None
    in_chans: int
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int = 64
    num_workers: int = 0
    augment: str = "none"
    hflip: float = 0.5
    calibration_images: int = 256
    seed: int = 0
    root: str | None = None
    in_memory: bool = True
    on_error: str = "raise"
    crop_pct: float | None = None
    interpolation: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        check_choice("data.augment", self.augment, AUGMENTATIONS)
        check_choice("data.on_error", self.on_error, ON_ERROR)
        lowest = {"image_size": 1, "in_chans": 1, "num_classes": 1, "batch_size": 1, "num_workers": 0, "calibration_images": 1}
        for name, bound in lowest.items():
            check_whole(f"data.{name}", getattr(self, name), bound)
        if not isinstance(self.in_memory, bool):
            raise UsageError(f"data.in_memory={self.in_memory!r}: allowed are true and false")
        if not 0 <= self.hflip <= 1:
            raise UsageError(f"data.hflip={self.hflip!r}: allowed are numbers from 0 to 1")
        self._check_crop()
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or len(values) != self.in_chans:
                shown = values if values is None else list(values)
                raise UsageError(f"data.{name}={shown}: needs one number for each of the {self.in_chans} channels")

    def _check_crop(self) -> None:
        if self.interpolation is not None:
            check_choice("data.interpolation", self.interpolation, INTERPOLATIONS)
        is_share = isinstance(self.crop_pct, int | float) and 0 < self.crop_pct <= 1
        if self.crop_pct is not None and (not is_share or isinstance(self.crop_pct, bool)):
            raise UsageError(f"data.crop_pct={self.crop_pct!r}: allowed are numbers above 0 to 1 and null")
