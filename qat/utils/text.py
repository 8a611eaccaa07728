"""Text from outside, as names of files, on its way to a terminal or a table; large numbers; names of what nested dicts hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

MISSING = "–"
PREFIXES = ("", "k", "M", "G", "T", "P")
# Control characters but line break and tab, and what stands for bytes of a name that are not UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with what would move a cursor, change colours, turn the direction or not be encoded as `\x1b`.

    Examples:
        >>> printable("a\x1b[31mb") == r"a\x1b[31mb"
        True
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    # os.fsdecode adds 0xdc00 to a byte.
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def scaled(value: float | None, unit: str = "") -> str:
    """Three significant digits and a prefix of powers of 1000: `190 kB`."""
    if value is None:
        return MISSING
    power = 0 if value < 1 else min(int(math.log10(value) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def leaves(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What nested dicts hold, each with the names that lead to it."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value
