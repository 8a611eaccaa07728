"""The knobs that all datasets share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from qat.data.auto_augment import AUGMENTATIONS, ERASE_MODES, INTERPOLATIONS, check_auto_augment
from qat.errors import UsageError
from qat.utils.validate import check_choice, check_int, check_number, check_text

# A typing mistake may ask for more processes or pixels than a machine survives.
HIGHEST_WORKERS, HIGHEST_SIDE, HIGHEST_REPEATS = 256, 2**14, 1000
CHOICES = {
    "on_error": ("raise", "skip"),
    "augment": AUGMENTATIONS,
    "erase_mode": ERASE_MODES,
    "train_interpolation": ("random", *INTERPOLATIONS),
    "mixup_mode": ("batch", "pair", "elem"),
}
HIGHEST = {
    "hflip": 1,
    "random_erasing": 1,
    "mixup_prob": 1,
    "mixup_switch_prob": 1,
    "memory_mb": math.inf,
    "mixup": math.inf,
    "cutmix": math.inf,
}
WHOLE = {
    "image_size": (1, HIGHEST_SIDE),
    "in_chans": (1,),
    "num_classes": (1,),
    "batch_size": (1,),
    "num_workers": (0, HIGHEST_WORKERS),
    "calibration_images": (1,),
    "seed": (0,),
    "erase_count": (1,),
    "repeats": (1, HIGHEST_REPEATS),
    "mixup_off_epoch": (0,),
}
# What only timm's augmentation does, and the values that ask for nothing.
TIMM_ONLY = ("rand_augment", "random_erasing", "erase_mode", "erase_count", "color_jitter", "train_interpolation")
NOTHING = (None, 0)
HIGHEST_HUE = 0.5


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
        num_workers: loader processes.
        augment: `none` (all that follows is off, `repeats` too), `light` (shifted crop, flip; with a `crop_pct` random resized crop, flip)
            or `timm` (random resized crop, flip and what follows). Under `light`, a knob that only `timm` has is refused unless it has its
            default or asks for nothing.
        hflip: probability of a horizontal flip under `light` and `timm`; 0 where left and right matter.
        shift: pixels by which `light` shifts an image at most, without a `crop_pct`; None = an eighth of `image_size`, 0 = flips alone.
        scale: lowest and highest area of a random resized crop as shares of the image's; under `timm`, and `light` with a `crop_pct`.
        rand_augment: timm's string (`rand-...`, `augmix-...`, `original`, `v0`, `3a` ...); None = off; `timm` only.
        color_jitter: range of factors of brightness, contrast and saturation: one number, or a list of three or with hue four; None =
            off; `timm` only, and there only where `rand_augment` is None or has `3a` in it, since timm leaves it out beside the others.
        random_erasing: probability that a rectangle is erased; `timm` only.
        erase_mode: fill of an erased rectangle: normal noise per `pixel`, `const` = the mean, `rand` = one normal colour; `timm` only.
        erase_count: rectangles at most; `timm` only.
        train_interpolation: of the random resized crop; `random` = bilinear or bicubic by chance; `timm` only.
        repeats: how often an image appears in the order of an epoch, each time augmented anew, while the epoch's length stays: it then sees
            one image in `repeats`. Source: Hoffer et al., "Augment Your Batch", CVPR 2020; DeiT has 3.
        mixup: alpha of mixup (arXiv 1710.09412), pairs of images of a batch blended, their classes too; 0 = off.
        cutmix: alpha of cutmix (arXiv 1905.04899), a rectangle from the other image; 0 = off.
        mixup_prob: probability that a batch (`pair`, `elem`: a pair, an image) is mixed at all.
        mixup_switch_prob: probability of cutmix where both are on.
        mixup_mode: one draw per `batch`, `pair` of images or `elem` (image).
        mixup_off_epoch: nothing is mixed from this epoch on; 0 = always mixed.
        class_weights: factors of the classes in losses on labels: `balanced` = images / (classes * images of the class), of the training
            split; None = all alike.
        calibration_images: images from which scales are initialised.
        seed: of order, augmentation and calibration images.
        root: folder with the data.
        in_memory: False = decode an image each time it is needed; images of different sizes always are.
        memory_mb: decoded images of a split that are more than so many megabytes are decoded when needed.
        cache: whether decoded images are kept on the disk for the next run: `auto` = if decoding took more than two seconds, True =
            always; False = neither kept nor looked for.
        on_error: what an image does that cannot be decoded: `raise` stops, `skip` warns and goes on without it.
        crop_pct: side of evaluation's centre crop as a share of the shorter side, before scaling to `image_size`; None = the whole image
            is squeezed into the square when read; photos: None = that of `model`.
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
    num_workers: int = 0
    augment: str = "none"
    hflip: float = 0.5
    shift: int | None = None
    scale: Sequence[float] = (0.08, 1.0)
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float | Sequence[float] | None = None
    random_erasing: float = 0.25
    erase_mode: str = "pixel"
    erase_count: int = 1
    train_interpolation: str = "random"
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0
    class_weights: str | None = None
    calibration_images: int = 256
    seed: int = 0
    root: str | None = None
    in_memory: bool = True
    memory_mb: float = 4096
    cache: str | bool = "auto"
    on_error: str = "raise"
    crop_pct: float | None = None
    interpolation: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        self._check_values()
        for name in ("root", "image_column", "label_column", "model"):
            if getattr(self, name) is not None:
                check_text(f"data.{name}", getattr(self, name))
        if self.class_weights is not None:
            check_choice("data.class_weights", self.class_weights, ("balanced",))
        if self.patch_size is not None:
            check_int("data.patch_size", self.patch_size, 1, HIGHEST_SIDE)
        if not isinstance(self.in_memory, bool):
            raise UsageError(f"data.in_memory={self.in_memory!r}: must be true or false")
        if self.cache != "auto" and not isinstance(self.cache, bool):
            raise UsageError(f"data.cache={self.cache!r}: must be one of auto, true, false")
        self._check_crop()
        _check_normalisation(self)
        _check_augmentation(self)

    def _check_values(self) -> None:
        for name, allowed in CHOICES.items():
            check_choice(f"data.{name}", getattr(self, name), allowed)
        for name, bounds in WHOLE.items():
            check_int(f"data.{name}", getattr(self, name), *bounds)
        for name, highest in HIGHEST.items():
            check_number(f"data.{name}", getattr(self, name), 0, highest=highest)

    @property
    def mixes(self) -> bool:
        """True if batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def _check_crop(self) -> None:
        if self.interpolation is not None:
            check_choice("data.interpolation", self.interpolation, INTERPOLATIONS)
        if self.crop_pct is not None:
            check_number("data.crop_pct", self.crop_pct, 0, above=True, highest=1)


def _check_augmentation(settings: DataSettings) -> None:
    """Raise `UsageError` for a value that cannot work, or that asks for what the chosen `augment` does not do."""
    if settings.shift is not None:
        check_int("data.shift", settings.shift, 0, settings.image_size - 1)
    _check_scale(settings.scale)
    _check_color_jitter(settings.color_jitter)
    check_auto_augment("data.rand_augment", settings.rand_augment)
    _check_effect(settings)


def _check_normalisation(settings: DataSettings) -> None:
    """Raise `UsageError` unless `mean` and `std` hold a finite number per channel, those of `std` above 0."""
    for name, lowest in (("mean", -math.inf), ("std", 0.0)):
        shown = _plain(getattr(settings, name))
        if not isinstance(shown, list) or len(shown) != settings.in_chans:
            raise UsageError(f"data.{name}={shown}: needs one number for each of the {settings.in_chans} channels")
        if not all(_is_number(value) and lowest < value < math.inf for value in shown):
            raise UsageError(f"data.{name}={shown}: must be a finite number{' above 0' if name == 'std' else ''}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_scale(scale: object) -> None:
    pair = _plain(scale)
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_number, pair)) or not 0 < pair[0] <= pair[1] <= 1:
        raise UsageError(f"data.scale={pair!r}: must be two shares of the image's area [lowest, highest], above 0 to 1")


def _check_color_jitter(value: object) -> None:
    shown = _plain(value)
    factors: list[Any] = shown if isinstance(shown, list) else [shown] * 3
    is_right = len(factors) in {3, 4} and all(_is_number(one) and 0 <= one < math.inf for one in factors)
    if value is not None and (not is_right or (len(factors) == 4 and factors[3] > HIGHEST_HUE)):
        kinds = f"[brightness, contrast, saturation] and [brightness, contrast, saturation, hue up to {HIGHEST_HUE}]"
        raise UsageError(f"data.color_jitter={shown!r}: must be null, a number of at least 0, {kinds}")


def _check_effect(settings: DataSettings) -> None:
    """`none` switches all off, and is no mistake; `light` with a knob that only `timm` has is one."""
    if settings.augment == "light":
        idle = TIMM_ONLY if settings.crop_pct is not None else (*TIMM_ONLY, "scale")
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}
        asked = {name: _plain(getattr(settings, name)) for name in idle}
        wrong = [f"data.{name}={value!r}" for name, value in asked.items() if value not in (*NOTHING, _plain(defaults[name]))]
        if wrong:
            raise UsageError(f"{', '.join(wrong)}: data.augment='light' does nothing of the kind; must be with data.augment=timm")
    shifts = settings.augment == "light" and settings.crop_pct is None
    if settings.shift is not None and settings.augment != "none" and not shifts:
        allowed = "allowed with data.augment=light and data.crop_pct=null"
        raise UsageError(f"data.shift={settings.shift}: crops are of random size here (data.scale); {allowed}")
    jitters = _plain(settings.color_jitter) not in (*NOTHING, [0] * 3, [0] * 4)
    if settings.augment == "timm" and jitters and settings.rand_augment and "3a" not in settings.rand_augment:
        shown = f"data.color_jitter={_plain(settings.color_jitter)!r}"
        raise UsageError(f"{shown}: timm leaves it out beside data.rand_augment={settings.rand_augment!r}; must be null, or with 3a")


def _plain(value: object) -> object:
    """Any sequence as a list, all else as it is."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
