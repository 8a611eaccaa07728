"""Arguments of other libraries' constructors, which take any text for true and fail on it in the middle of a run, or never."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from qat.errors import UsageError
from qat.spec import HIGHEST_NUMBER, check_int, check_number

POSITIVE = {"img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "update_every_n_steps"}
_PLAIN = (bool, int, float, str)


def check_arguments(setting: str, constructor: Callable[..., Any], arguments: Mapping[str, Any], *, lowest: int = 0) -> None:
    """Raise `UsageError` unless plain arguments are of the kinds that the constructor's annotations say.

    What has no annotation, a postponed one as in this package, or one of another kind, is left to the constructor.

    Args:
        setting: the group that the arguments are from, `model.args`.
        constructor: class or function.
        arguments: by name.
        lowest: whole number.

    Raises:
        UsageError: a text for a flag, a flag for a number, a rate of 1, a negative count ...
    """
    try:
        declared = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        return
    for name, value in arguments.items():
        kinds = _kinds(declared[name].annotation) if name in declared else set()
        if kinds & set(_PLAIN) and not (value is None and type(None) in kinds):
            _check_kind(f"{setting}.{name}", value, kinds, 1 if name in POSITIVE else lowest)


def _kinds(annotation: Any) -> set[Any]:
    """The kinds of an annotation; empty where one is no class, as with containers, of which nothing is said."""
    return {annotation, *typing.get_args(annotation)}


def _check_kind(setting: str, value: object, kinds: set[Any], lowest: int) -> None:
    plain = kinds & set(_PLAIN)
    if isinstance(value, bool) or plain == {bool}:
        if not (isinstance(value, bool) and bool in kinds):
            raise UsageError(f"{setting}={value!r}: must be {_in_words(plain)}")
    elif isinstance(value, str) or plain == {str}:
        if value == "" and setting.endswith(("dir", "filename")):
            raise UsageError(f"{setting}='': must be a path")
        if not (isinstance(value, str) and str in kinds) and not _others(kinds):
            raise UsageError(f"{setting}={value!r}: must be {_in_words(plain)}")
    elif float in kinds:
        _check_float(setting, value)
    elif int in kinds and (isinstance(value, float | int) or not _others(kinds)):
        check_int(setting, value, lowest)


def _in_words(plain: set[type]) -> str:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return " or ".join(word for kind, word in words.items() if kind in plain)


def _check_float(setting: str, value: object) -> None:
    if setting.endswith("_rate"):
        check_number(setting, value, 0, below=1)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > HIGHEST_NUMBER:
        raise UsageError(f"{setting}={value!r}: must be a finite number")


def _others(kinds: set[Any]) -> bool:
    """True if an annotation allows more than None and plain values: pairs, devices, classes."""
    return bool({kind for kind in kinds if kind not in {*_PLAIN, type(None)} and typing.get_origin(kind) is not typing.Union})
