"""Domain checks of settings: each raises `UsageError` with the form `setting=value: must be ...`."""

from __future__ import annotations

import difflib
import functools
import math
import sys
from collections.abc import Iterable, Sequence

from qat.errors import UsageError

FLOAT_BITS = 32
LOWEST_BITS, HIGHEST_BITS = 2, 8
# Larger counts overflow in torch, or are typing mistakes.
HIGHEST_WHOLE = 2**31 - 1
HIGHEST_NUMBER = sys.float_info.max


def unknown(setting: str, name: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """What to say of a name that there is not: the nearest of those that there are, here or in another group, or all that are here."""
    choices, close = sorted(known), functools.partial(difflib.get_close_matches, name, n=3)
    full = {one.rpartition(".")[2]: one for one in reversed(elsewhere)} | dict(zip(choices, choices, strict=True))
    near = [name] if name in full else close(choices) or close(full)
    near = near[: 1 if near and name.startswith(near[0]) else 3]
    how = "must be one of" if not near else "near are" if near[1:] else "near is"
    return f"{setting}: unknown; {how} {', '.join(full[one] for one in near or choices)}"


def check_choice(setting: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{setting}={value!r}: must be one of {', '.join(allowed)}")


def check_number(
    setting: str, value: object, lowest: float, *, above: bool = False, below: float = math.inf, highest: float = math.inf
) -> None:
    """Raise `UsageError` unless `value` is a number from `lowest` (or above it), up to `highest`, or up to but not including `below`."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value < below and not (above and value == lowest)
    if not (fits and value <= min(highest, HIGHEST_NUMBER)):  # type: ignore[operator]
        end = f" to below {below:g}" if below < math.inf else f" to {highest:g}" if highest < math.inf else ""
        bound = f"above {lowest:g}{end}" if above else f"from {lowest:g}{end}" if end else f"of at least {lowest:g}"
        raise UsageError(f"{setting}={value!r}: must be a number {bound}")


def check_int(setting: str, value: object, lowest: int, highest: int = HIGHEST_WHOLE) -> None:
    """Raise `UsageError` unless `value` is an integer from `lowest` to `highest`."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        is_too_large = isinstance(value, int) and value > highest
        bound = f"from {lowest} to {highest}" if is_too_large or highest < HIGHEST_WHOLE else f"of at least {lowest}"
        raise UsageError(f"{setting}={value!r}: must be an integer {bound}")


def check_text(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise UsageError(f"{setting}={value!r}: must be a text that is not empty")


def check_globs(setting: str, value: object, example: str) -> tuple[str, ...]:
    """One glob or several as a tuple; raises `UsageError` unless `value` is a text or a list of texts that are not empty."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found or not all(isinstance(glob, str) and glob for glob in found):
        raise UsageError(f"{setting}={value!r}: must be a list of globs such as {example}")
    return tuple(found)


def check_bits(setting: str, bits: object, quantizer: str = "") -> None:
    """Raise `UsageError` unless `bits` is a width that the quantizers can represent.

    Two bits at least: at one bit the mid-rise grid of StatsQ would have three levels. Eight at most: codes fit one byte.
    """
    if quantizer == "float" and bits == FLOAT_BITS:
        return
    if isinstance(bits, bool) or not isinstance(bits, int) or not LOWEST_BITS <= bits <= HIGHEST_BITS:
        raise UsageError(f"{setting}={bits!r}: must be an integer from {LOWEST_BITS} to {HIGHEST_BITS}")
