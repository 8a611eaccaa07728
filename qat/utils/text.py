"""Make text safe for terminals and tables, format numbers, and read files of limited size."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MISSING = "–"
MAX_FILE_BYTES = 2**30  # bytes of one image, table or file of settings
PREFIXES = ("", "k", "M", "G", "T", "P")
# Control characters except line feeds and tabs, Unicode's line separators and explicit directional
# formatting, and surrogates (Python's form of undecodable bytes in file names).
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escape what controls a terminal or cannot be encoded, except line breaks and tabs.

    Examples:
        >>> printable("a\x1b[31mb") == r"a\x1b[31mb"
        True
    """
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """Escape a text as `printable` does, and also escape line breaks and tabs."""
    return printable(text).replace("\n", "\\x0a").replace("\t", "\\x09")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # `os.fsdecode` adds this number to an undecodable byte
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def format_si(value: float, unit: str = "") -> str:
    """Format a number with up to three significant digits; from 1000 on, an SI prefix: `190 kB`."""
    value = float(f"{value:.3g}")  # 999,600 becomes 1 M
    power = 0
    if value >= 1:
        power = min(int(math.log10(value) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}{unit}".rstrip()


def format_count(n: int, noun: str) -> str:
    """Format a number and a noun in singular or plural: `1 image`, `2 images`, `2 classes`."""
    if n == 1:
        return f"{n} {noun}"
    return f"{n} {noun}es" if noun.endswith("s") else f"{n} {noun}s"


def chance_level_remark(results: Mapping[str, Any]) -> str:
    """Remark on an accuracy that is hardly better than always predicting the most frequent class.

    Returns:
        The remark, if `top1` is at most two standard errors above `majority_share`, the percentage
        of images in the most frequent class. If it is higher, `images` is 0 or a number is missing,
        an empty string.
    """
    top1 = results.get("top1")
    images = results.get("images")
    majority_percent = results.get("majority_share")
    if top1 is None or not images or majority_percent is None:
        return ""
    standard_error = math.sqrt(majority_percent * (100 - majority_percent) / images)
    if top1 - majority_percent > 2 * standard_error:
        return ""
    return (
        "not clearly better than always predicting the most frequent class, "
        f"which gives {majority_percent:.2f} %"
    )


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a file whose size is limited.

    Raises:
        OSError: the file cannot be read, has more than `MAX_FILE_BYTES` bytes, or is not a regular
            file (a pipe or a device might never end).
    """
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_FILE_BYTES:
        raise OSError(f"No such file, or larger than {MAX_FILE_BYTES >> 30} GiB")
    return Path(path).read_bytes()


def is_number(text: str) -> bool:
    """True if Python can parse a text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_inside(path: Path, folder: Path) -> bool:
    """True if a path, with links resolved, is a file inside the folder.

    A path may come from a JSON file of someone else, which could name any file.
    """
    return os.path.isfile(path) and path.resolve().is_relative_to(folder.resolve())


def json_object(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """Read the object in a JSON file.

    The result is empty if the file cannot be read, does not contain an object, or is not in
    `folder`.
    """
    if folder is not None and not is_inside(path, folder):
        return {}
    try:
        content = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
