"""Checks of settings, which raise `UsageError` with messages like `setting=value: must be ...`."""

from __future__ import annotations

import difflib
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from qat.errors import UsageError

FLOAT_BITS = 32
MIN_BITS = 2
MAX_BITS = 8
# Bits of the number formats in which blocks of floats share a scale.
BLOCK_FLOATS = {"mxfp": (4, 8), "nvfp4": (4,)}
# 8-bit floats with one scale per tensor or row. The scale of an activation is learned (`fp8`) or
# only calibrated (`fp8_held`).
FP8 = ("fp8", "fp8_held")
# Larger integers overflow in torch, or are typing mistakes.
MAX_INT = 2**31 - 1
MAX_FLOAT = sys.float_info.max
# Maximum height and width of an image in pixels.
MAX_IMAGE_SIDE = 2**14
# With 0.1, an image is resized to ten times the input size before it is cropped.
MIN_CROP = 0.1
# VOLO uses 1.15, which adds a border around the image.
MAX_CROP = 2
CROP_MODES = ("center", "center_floor", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def unknown_message(
    setting: str, name: str, allowed: Iterable[str], elsewhere: Sequence[str] = ()
) -> str:
    """Message about an unknown name, with the closest names, or else all allowed names.

    Args:
        setting: the setting as the message shows it, with group and value if they help.
        name: the unknown name.
        allowed: all names that can be used.
        elsewhere: full names of settings in other groups, whose last parts `name` is compared with.
    """
    choices = sorted(allowed)
    # Reversed, so that of several settings with the same last part the first one counts.
    full_names = {full_name.rpartition(".")[2]: full_name for full_name in reversed(elsewhere)}
    full_names |= {choice: choice for choice in choices}
    if name in full_names:
        closest = [name]
    else:
        closest = difflib.get_close_matches(name, choices)
        closest = closest or difflib.get_close_matches(name, full_names)
    if not closest:
        return f"{setting}: unknown; must be one of {', '.join(choices)}"
    if name.startswith(closest[0]):  # a longer form of this choice: deit_tiny means deit_t
        closest = closest[:1]
    suggestions = [full_names[match] for match in closest]
    return f"{setting}: unknown; closest: {', '.join(suggestions)}"


def check_choice(setting: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{setting}={value!r}: must be one of {', '.join(allowed)}")


def check_number(
    setting: str,
    value: object,
    lowest: float,
    *,
    exclusive_lowest: bool = False,
    below: float = math.inf,
    highest: float = math.inf,
) -> None:
    """Raise `UsageError` unless `value` is a number between two bounds.

    Args:
        setting: name of the setting, for the message.
        value: value of the setting.
        lowest: lower bound.
        exclusive_lowest: True if `lowest` itself is not allowed.
        below: upper bound that is not allowed itself.
        highest: upper bound that is allowed itself.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_in_range = lowest <= value < below and value <= min(highest, MAX_FLOAT)
        is_excluded = exclusive_lowest and value == lowest
        if is_in_range and not is_excluded:
            return

    upper_bound = ""
    if below < math.inf:
        upper_bound = f" to below {below:g}"
    elif highest < math.inf:
        upper_bound = f" to {highest:g}"
    if exclusive_lowest:
        bounds = f"above {lowest:g}{upper_bound}"
    elif upper_bound:
        bounds = f"from {lowest:g}{upper_bound}"
    else:
        bounds = f"of at least {lowest:g}"
    raise UsageError(f"{setting}={value!r}: must be a number {bounds}")


def check_int(setting: str, value: object, lowest: int, highest: int = MAX_INT) -> None:
    """Raise `UsageError` unless `value` is an integer from `lowest` to `highest`."""
    if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
        return
    bounds = f"of at least {lowest}"
    is_too_large = isinstance(value, int) and value > highest
    if is_too_large or highest < MAX_INT:
        bounds = f"from {lowest} to {highest}"
    raise UsageError(f"{setting}={value!r}: must be an integer {bounds}")


def check_bool(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a bool; a non-empty text would count as true."""
    if not isinstance(value, bool):
        raise UsageError(f"{setting}={value!r}: must be true or false")


def check_text(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise UsageError(f"{setting}={value!r}: must be a non-empty string")


def check_list(setting: str, value: object) -> Sequence[Any]:
    """Return `value`; raise `UsageError` unless it is a non-empty list."""
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"{setting}={value!r}: must be a non-empty list")
    return value


def check_globs(setting: str, value: object, example: str) -> tuple[str, ...]:
    """Return one glob or a list of globs as a tuple.

    Raises:
        UsageError: `value` is neither a non-empty string nor a non-empty list of such strings.
    """
    globs = [value] if isinstance(value, str) else value
    is_list = isinstance(globs, list | tuple) and len(globs) > 0
    if is_list and all(isinstance(glob, str) and glob for glob in cast(list, globs)):
        return tuple(cast(list[str], globs))
    raise UsageError(f"{setting}={value!r}: must be a list of globs such as {example}")


def check_channels(setting: str, values: Any, chans: int | None, lowest: float = -math.inf) -> None:
    """Raise `UsageError` unless there is a finite number above `lowest` for each channel.

    Args:
        setting: name of the setting, for the message.
        values: value of the setting.
        chans: number of channels; None = any number.
        lowest: lower bound of the numbers; the bound itself is not allowed.
    """
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    has_length = is_list and (chans is None or chans == len(values))
    if has_length and all(_is_between(value, lowest, math.inf) for value in values):
        return
    lower_bound = f" above {lowest:g}" if lowest > -math.inf else ""
    raise UsageError(
        f"{setting}={values!r}: must be a finite number{lower_bound} "
        f"for each of the {chans or 'image'} channels"
    )


def _is_between(value: Any, lowest: float, highest: float) -> bool:
    """True for a number strictly between two bounds."""
    return isinstance(value, int | float) and lowest < value < highest


def check_images(origin: str, config: Mapping[str, Any]) -> None:
    """Raise `UsageError` if a config describes impossible preprocessing of images.

    Args:
        origin: the file or argument, for the message.
        config: timm's `pretrained_cfg`, or a data config; values that are missing are not checked.
    """
    chans = config.get("in_chans")
    size = config.get("input_size")
    if size is not None:
        is_triple = isinstance(size, list | tuple) and len(size) == 3
        if not is_triple or not all(
            type(side) is int and 0 < side <= MAX_IMAGE_SIDE for side in size
        ):
            raise UsageError(
                f"{origin}.input_size={size!r}: must be channels, height and width, "
                f"integers from 1 to {MAX_IMAGE_SIDE}"
            )
        chans = size[0]
    checks: dict[str, tuple[Any, ...]] = {
        "image_size": (check_int, 1, MAX_IMAGE_SIDE),
        "mean": (check_channels, chans),
        "std": (check_channels, chans, 0.0),
        "crop_pct": (functools.partial(check_number, highest=MAX_CROP), MIN_CROP),
        "crop_mode": (check_choice, CROP_MODES),
        "interpolation": (check_choice, INTERPOLATIONS),
    }
    for name, (check, *bounds) in checks.items():
        value = config.get(name)
        if value is not None:
            check(f"{origin}.{name}", value, *bounds)


def check_bits(setting: str, bits: object, quantizer: str = "") -> None:
    """Raise `UsageError` unless `bits` is a width that `quantizer` can represent.

    Codes have at least 2 bits, because StatsQ's grid of half steps would have three levels at 1
    bit, and at most 8 bits, because they must fit in one byte.
    """
    if quantizer == "float" and bits == FLOAT_BITS:
        return
    check_int(setting, bits, MIN_BITS, MAX_BITS)
    widths = (8,) if quantizer in FP8 else BLOCK_FLOATS.get(quantizer)
    if widths is not None and bits not in widths:
        choices = " or ".join(map(str, widths))
        raise UsageError(f"{setting}={bits!r}: must be {choices} with {quantizer}")
