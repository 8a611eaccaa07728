"""What `DataSettings` may hold where several values belong together: augmentation, normalisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from qat.data.auto_augment import check_auto_augment
from qat.errors import UsageError
from qat.utils.validate import check_int

# What only timm's augmentation does, and the values that ask for nothing.
TIMM_ONLY = ("rand_augment", "random_erasing", "erase_mode", "erase_count", "color_jitter", "train_interpolation")
NOTHING = (None, 0)
HIGHEST_HUE = 0.5


def check_augmentation(settings: Any) -> None:
    """Raise `UsageError` for a value that cannot work, or that asks for what the chosen `augment` does not do."""
    if settings.shift is not None:
        check_int("data.shift", settings.shift, 0, settings.image_size - 1)
    _check_scale(settings.scale)
    _check_color_jitter(settings.color_jitter)
    check_auto_augment("data.rand_augment", settings.rand_augment)
    _check_effect(settings)


def check_normalisation(settings: Any) -> None:
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


def _check_effect(settings: Any) -> None:
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
