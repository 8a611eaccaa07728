"""Translate arguments of the command line to Hydra's grammar."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from qat.tasks.conf import options

# Settings whose values are paths or model names: by full name, and by the last part of the name.
PATHS = {"predict", "run", "sweep", "file", "run_dir", "model.name"}
PATHS_OF_GROUPS = {"ckpt", "weights", "root", "dir", "dirpath", "save_dir"}
# A quoted text; or a path, also in a list or sweep, that Hydra would read as a number or bool.
QUOTED = r"((['\"])(?:\\.|(?!\2).)*\2)"
NUMBER_LIKE = r"(?<![^\[(,\s])(?:[+-]?(?:[.\d][\w.+-]*|inf|nan)|true|false)(?![^\]),\s])"
ELEMENT = re.compile(f"{QUOTED}|{NUMBER_LIKE}", re.IGNORECASE)
# Values that need no quotes in Hydra's grammar, values that use the grammar, and sweeps.
PLAIN = re.compile(r"[A-Za-z0-9_./:+%@-]*")
GRAMMAR = re.compile(r"['\"\[]|.*\$\{")
SWEEP = re.compile(r",|\b(choice|range|interval|glob|tag|sort|shuffle)\(")
SWEEP_OF_NUMBERS = re.compile(r"\b(range|interval)\(")
# Settings that may be missing from the config; Hydra adds them with `++`.
ADDABLE = re.compile(r"(quant|ptq)\.overrides|model\.args\..*|data\.image_size")


def to_hydra(arguments: Sequence[str]) -> list[str]:
    """Translate arguments for Hydra.

    `~` and a leading `~/` in values are expanded, paths are quoted where Hydra's grammar needs
    quotes, settings that may be missing get `++`, and a timm or hub model in `model=NAME` is
    replaced by its settings.
    """
    is_multirun = "-m" in arguments or "--multirun" in arguments
    hydra_arguments = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+")
        if ADDABLE.fullmatch(name):
            key = f"++{name}"
        if value == "~" or value.startswith("~/"):
            value = os.path.expanduser("~") + value[1:]
        if name in PATHS or name.rpartition(".")[2] in PATHS_OF_GROUPS:
            value = _quote_path(value, is_multirun=is_multirun)
        if name == "model":
            hydra_arguments += _model_settings(value)
        else:
            hydra_arguments.append(f"{key}{equals}{value}")
    return hydra_arguments


def _quote_path(value: str, *, is_multirun: bool) -> str:
    """Quote a path that Hydra would refuse, and every path that it would read as a number or bool.

    The value may also be a list or, in a multirun, a sweep; a value with `range` or `interval`
    stays as is.
    """
    is_sweep = is_multirun and SWEEP.search(value)
    if not (PLAIN.fullmatch(value) or GRAMMAR.match(value) or is_sweep):
        value = _quote(value)
    if SWEEP_OF_NUMBERS.search(value):
        return value
    # Group 1 is a text that already has quotes.
    return ELEMENT.sub(lambda match: match[1] or f"'{match[0]}'", value)


def _quote(value: str) -> str:
    """Put a value in single quotes; escape quotes, and backslashes before a quote or the end."""

    def escape(match: re.Match[str]) -> str:
        backslashes, quote = match.groups()
        return backslashes * 2 + ("\\'" if quote else "")

    escaped = re.sub(r"(\\*)('|$)", escape, value)
    return f"'{escaped}'"


def _model_settings(name: str) -> list[str]:
    """Settings for `model=NAME` if NAME is a hub or timm model; other names are unchanged."""
    if name.startswith("hf-hub:"):
        return ["model=_hub", f"model.name={name}"]
    if name in options("model") or not PLAIN.fullmatch(name):
        return [f"model={name}"]
    import timm

    timm_name = name.removeprefix("timm/")
    if timm.is_model(timm_name):
        return ["model=_timm", f"model.name={timm_name}"]
    return [f"model={name}"]
