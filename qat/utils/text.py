"""Text from outside, as names of files, on its way to a terminal or a table; large numbers; files that have an end."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MISSING = "–"
MOST_READ = 2**30  # bytes of an image, a table, a file of settings
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


def one_line(text: str) -> str:
    """The text as `printable` returns it, with line breaks and tabs escaped too: a name takes one line or one cell."""
    return printable(text).replace("\n", "\\x0a").replace("\t", "\\x09")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    # os.fsdecode adds 0xdc00 to a byte.
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def scaled(value: float, unit: str = "") -> str:
    """Three significant digits and a prefix of powers of 1000: `190 kB`."""
    value = float(f"{value:.3g}")  # 999,600 is 1 M
    power = 0 if value < 1 else min(int(math.log10(value) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}{unit}".rstrip()


def count(n: int, noun: str) -> str:
    """`1 image`, `2 images`, `2 classes`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"


def unlearned(results: Mapping[str, Any]) -> str:
    """What to say of an accuracy within two standard errors of that of always naming the most frequent class; else empty."""
    top1, images, share = (results.get(key) for key in ("top1", "images", "majority_share"))
    if (
        top1 is None
        or not images
        or share is None
        or top1 - share > 2 * math.sqrt(share * (100 - share) / images)
    ):
        return ""
    return f"not clearly better than always predicting the most frequent class, which gives {share:.2f} %"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_file(path: str | os.PathLike[str]) -> bytes:
    """What a file holds.

    Raises:
        OSError: there is none, it has more than `MOST_READ` bytes, or is a pipe or a device, which would give bytes for ever.
    """
    if not os.path.isfile(path) or os.path.getsize(path) > MOST_READ:
        raise OSError(f"No such file, or none that ends within {MOST_READ} bytes")
    return Path(path).read_bytes()


def is_number(text: str) -> bool:
    """True for a text that Python reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a file in a folder, after `..` and links: a directory from elsewhere may name any file."""
    return os.path.isfile(path) and path.resolve().is_relative_to(folder.resolve())


def json_object(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """What a JSON file holds; empty where it cannot be read, or holds something else, or is not in `folder`."""
    if folder is not None and not is_inside(path, folder):
        return {}
    try:
        found = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
