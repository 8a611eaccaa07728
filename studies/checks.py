"""Reading of plain data, entry by entry: what cannot be is answered in one line with file, key, value and what is allowed."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.errors import UsageError

NUMBER_FORMAT = re.compile(r"\+?,?\.\d[feg%]")
_ABSENT = object()
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_Check = Callable[[Any], bool]


def wrong(file: str | Path, key: str, value: object, allowed: str) -> UsageError:
    """The error of one entry of a file."""
    return UsageError(f"{file}: {key}={_SHORT.repr(value)}: {allowed}")


def is_text(value: object) -> bool:
    """A text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_whole(value: object) -> bool:
    """A whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_format(value: object) -> bool:
    """A format of numbers such as `.2f`."""
    return isinstance(value, str) and NUMBER_FORMAT.fullmatch(value) is not None


def is_list(of: _Check) -> _Check:
    """A check for lists whose entries pass another one."""
    return lambda value: isinstance(value, list) and all(of(entry) for entry in value)


def is_mapping(of: _Check, keys: _Check = is_text) -> _Check:
    """A check for mappings whose values and keys pass others."""
    return lambda value: isinstance(value, dict) and all(keys(key) and of(entry) for key, entry in value.items())


class Fields:
    """The entries of one mapping in a file.

    Args:
        file: named in errors.
        place: where in the file the mapping is, in front of the names of its entries; empty at the top.
        content: what was read.
        names: the entries that there may be.

    Raises:
        UsageError: it is no mapping, or has another entry.
    """

    def __init__(self, file: Path, place: str, content: object, names: Sequence[str]) -> None:
        self.file = file
        self.place = place
        if not isinstance(content, Mapping):
            raise wrong(file, place or "content", content, f"allowed is a mapping with {', '.join(names)}")
        for name in content:
            if name not in names:
                raise wrong(file, self.key(name), content[name], f"unknown, allowed are {', '.join(names)}")
        self._content = content

    def key(self, name: object) -> str:
        """An entry as errors call it."""
        return f"{self.place}.{name}" if self.place else str(name)

    def wrong(self, name: str, allowed: str) -> UsageError:
        """The error of one entry."""
        return wrong(self.file, self.key(name), self._content.get(name), allowed)

    def has(self, name: str) -> bool:
        """Whether there is an entry."""
        return name in self._content

    def take(self, name: str, fits: _Check, allowed: str, default: Any = _ABSENT) -> Any:
        """The value of an entry; one that is absent is an error if it has no default."""
        if name not in self._content and default is not _ABSENT:
            return default
        if name not in self._content or not fits(self._content[name]):
            raise self.wrong(name, f"allowed is {allowed}")
        return self._content[name]

    def text(self, name: str, default: Any = _ABSENT) -> str:
        """A text, without white space around it."""
        found = self.take(name, is_text, "a text that is not empty", default)
        return found.strip()

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """One of several texts."""
        return self.take(name, lambda value: value in allowed, f"one of {', '.join(allowed)}")
