"""Domain checks of settings: each raises `UsageError` with the form `setting=value: must be ...`."""

from __future__ import annotations

import difflib
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qat.errors import UsageError

FLOAT_BITS = 32
LOWEST_BITS, HIGHEST_BITS = 2, 8
# Of floats in blocks that share a scale.
BLOCK_FLOATS = {"mxfp": (4, 8), "nvfp4": (4,)}
# Larger counts overflow in torch, or are typing mistakes.
HIGHEST_WHOLE = 2**31 - 1
HIGHEST_NUMBER = sys.float_info.max
# How an image is prepared: side in pixels at most, crops, interpolations.
MOST_SIDE = 2**14
# A tenth makes an image ten times as large before it is cropped; VOLO has 1.15, a border around the image.
LOWEST_CROP, HIGHEST_CROP = 0.1, 2
CROP_MODES, INTERPOLATIONS = (
    ("center", "squash", "border"),
    ("nearest", "bilinear", "bicubic", "lanczos"),
)


def unknown(setting: str, name: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """What to say of a name that there is not: the nearest of those that there are, here or in another group, or all that are here."""
    choices, close = sorted(known), functools.partial(difflib.get_close_matches, name)
    full = {one.rpartition(".")[2]: one for one in reversed(elsewhere)} | {
        one: one for one in choices
    }
    near = [name] if name in full else close(choices) or close(full)
    if near and name.startswith(near[0]):
        near = near[:1]
    how = "closest:" if near else "must be one of"
    return f"{setting}: unknown; {how} {', '.join(full[one] for one in near or choices)}"


def check_choice(setting: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{setting}={value!r}: must be one of {', '.join(allowed)}")


def check_number(
    setting: str,
    value: object,
    lowest: float,
    *,
    above: bool = False,
    below: float = math.inf,
    highest: float = math.inf,
) -> None:
    """Raise `UsageError` unless `value` is a number from `lowest` (or above it), up to `highest`, or up to but not including `below`."""
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and lowest <= value < below
        and not (above and value == lowest)
    )
    if not (fits and value <= min(highest, HIGHEST_NUMBER)):  # type: ignore[operator]
        end = (
            f" to below {below:g}"
            if below < math.inf
            else f" to {highest:g}"
            if highest < math.inf
            else ""
        )
        bound = (
            f"above {lowest:g}{end}"
            if above
            else f"from {lowest:g}{end}"
            if end
            else f"of at least {lowest:g}"
        )
        raise UsageError(f"{setting}={value!r}: must be a number {bound}")


def check_int(setting: str, value: object, lowest: int, highest: int = HIGHEST_WHOLE) -> None:
    """Raise `UsageError` unless `value` is an integer from `lowest` to `highest`."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        is_too_large = isinstance(value, int) and value > highest
        bound = (
            f"from {lowest} to {highest}"
            if is_too_large or highest < HIGHEST_WHOLE
            else f"of at least {lowest}"
        )
        raise UsageError(f"{setting}={value!r}: must be an integer {bound}")


def check_bool(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is true or false: of a text, Python would take any for true."""
    if not isinstance(value, bool):
        raise UsageError(f"{setting}={value!r}: must be true or false")


def check_text(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise UsageError(f"{setting}={value!r}: must be a non-empty string")


def check_list(setting: str, value: object) -> Sequence[Any]:
    """A list of settings, to check one by one; raises `UsageError` unless it is a list that is not empty."""
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"{setting}={value!r}: must be a non-empty list")
    return value


def check_globs(setting: str, value: object, example: str) -> tuple[str, ...]:
    """One glob or several as a tuple; raises `UsageError` unless `value` is a text or a list of texts that are not empty."""
    found = (value,) if isinstance(value, str) else value
    if (
        not isinstance(found, list | tuple)
        or not found
        or not all(isinstance(glob, str) and glob for glob in found)
    ):
        raise UsageError(f"{setting}={value!r}: must be a list of globs such as {example}")
    return tuple(found)


def check_channels(setting: str, values: Any, chans: int | None, lowest: float = -math.inf) -> None:
    """Raise `UsageError` unless there is a finite number above `lowest` for each of `chans` channels (None: of any)."""
    fits = (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and (chans is None or chans == len(values))
    )
    if not (
        fits
        and all(isinstance(value, int | float) and lowest < value < math.inf for value in values)
    ):
        above = f" above {lowest:g}" if lowest > -math.inf else ""
        raise UsageError(
            f"{setting}={values!r}: must be a finite number{above} for each of the {chans or 'image'} channels"
        )


def check_images(where: str, said: Mapping[str, Any]) -> None:
    """Raise `UsageError` if what a file says of how images are prepared, as timm's `pretrained_cfg` or as a data config, cannot be."""
    chans, size = said.get("in_chans"), said.get("input_size")
    if size is not None:
        if not (
            isinstance(size, list | tuple)
            and len(size) == 3
            and all(type(side) is int and 0 < side <= MOST_SIDE for side in size)
        ):
            raise UsageError(
                f"{where}.input_size={size!r}: must be channels, height and width, integers from 1 to {MOST_SIDE}"
            )
        chans = size[0]
    checks: dict[str, tuple[Any, ...]] = {
        "image_size": (check_int, 1, MOST_SIDE),
        "mean": (check_channels, chans),
        "std": (check_channels, chans, 0.0),
        "crop_pct": (functools.partial(check_number, highest=HIGHEST_CROP), LOWEST_CROP),
        "crop_mode": (check_choice, CROP_MODES),
        "interpolation": (check_choice, INTERPOLATIONS),
    }
    for name, (check, *bounds) in checks.items():
        if (value := said.get(name)) is not None:
            check(f"{where}.{name}", value, *bounds)


def check_bits(setting: str, bits: object, quantizer: str = "") -> None:
    """Raise `UsageError` unless `bits` is a width that the quantizers can represent.

    Two bits at least: at one bit the mid-rise grid of StatsQ would have three levels. Eight at most: codes fit one byte.
    """
    if quantizer == "float" and bits == FLOAT_BITS:
        return
    check_int(setting, bits, LOWEST_BITS, HIGHEST_BITS)
    if bits not in BLOCK_FLOATS.get(quantizer, (bits,)):
        raise UsageError(
            f"{setting}={bits!r}: must be {' or '.join(map(str, BLOCK_FLOATS[quantizer]))} with {quantizer}"
        )
