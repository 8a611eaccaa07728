"""What is wrong with an argument that Hydra cannot compose, in one line; its own answer takes five, or thirty, or a traceback."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

SHOWN = 3  # near names in a line
# What composing raises; the last is of a group that is set to null or to a number.
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
Compose = Callable[[Sequence[str]], DictConfig]


@contextlib.contextmanager
def answered_in_one_line() -> Generator[None, None, None]:
    """Within it a config that cannot be composed ends the process with one line and exit code 1. HYDRA_FULL_ERROR=1 leaves it to Hydra.

    Hydra has no hook between such a mistake and the end of the process, so its loader is wrapped here: all configs come from it,
    those of a sweep's jobs too.
    """
    load = ConfigLoaderImpl.load_configuration

    def load_configuration(self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> DictConfig:
        def compose(some: Sequence[str]) -> DictConfig:
            return load(self, config_name, list(some), *args, **kwargs)

        try:
            return compose(overrides)
        except MISTAKES as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            sys.exit(f"error: {explain(error, overrides, compose, functools.partial(_options_with, self))}")

    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def explain(error: Exception, overrides: Sequence[str], compose: Compose, options_with: Callable[[str, str], list[str]]) -> str:
    """One line about an error of composing.

    Args:
        error: what composing `overrides` has raised.
        overrides: the arguments, as typed.
        compose: makes a config of some of them, to see what is there.
        options_with: the options of a group that have a key; all for an empty one.

    Returns:
        The line: the argument, what is wrong with it, what is allowed or near.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group.startswith("experiment/_row/"):
            return f"model={option}: must be one of {', '.join(options_with(group, ''))}, which have a published row of these bits"
        options = error.options or options_with(group, "")  # of a list of options Hydra names none
        return f"{group}={option}: there is no such option; must be one of {', '.join(o for o in options if not o.startswith('_'))}"
    if isinstance(error, OverrideParseException):
        reason = " ".join(line for line in str(error).splitlines() if not line.startswith(("Error parsing", "See ")))
        return f"{error.override}: not understood ({reason}); must be key=value, in quotes if it has blanks, commas or brackets"
    cause = error.__cause__
    if there := re.search("An item is already at '([^']+)'", str(error)):
        typed = next((one for one in overrides if one.startswith(f"+{there[1]}=")), f"+{there[1]}")
        return f"{typed}: there is such a setting already; {typed[1:]} sets it"
    argument = _argument(error, overrides, compose)
    if argument and str(error).startswith("Ambiguous value"):
        key, _, values = argument.partition("=")
        return f"{argument}: several values; with -m they are so many runs, {key}=[{values}] is a list"
    if argument and isinstance(cause, ConfigKeyError | ConfigAttributeError) and argument[0] not in "+~":
        others = [other for other in overrides if other != argument]
        return f"{argument}: there is no such setting; {_advice(argument, others, compose, options_with)}"
    # What follows an empty line is the search path; what OmegaConf knows of the node takes lines of its own.
    lines = str(cause or error).strip().partition("\n\n")[0].splitlines()
    line = "; ".join(part.strip().rstrip(".") for part in lines if "full_key:" not in part and "object_type=" not in part)
    return f"{argument}: {line}" if argument and argument not in line else line


def _argument(error: Exception, overrides: Sequence[str], compose: Compose) -> str | None:
    """The argument that an error is about: it names the key, or does not come without the argument."""
    key = getattr(error.__cause__, "full_key", None)
    for argument in overrides:
        if key and f"{argument.partition('=')[0]}.".startswith(f"{key}."):
            return argument
    for argument in overrides:
        try:
            compose([other for other in overrides if other != argument])
        except MISTAKES as other:
            if str(other) == str(error):
                continue
        return argument
    return None


def _advice(argument: str, others: Sequence[str], compose: Compose, options_with: Callable[[str, str], list[str]]) -> str:
    """Which options of the group have a key, or which keys are near to it."""
    key = argument.partition("=")[0]
    group, _, rest = key.partition(".")
    for some in (others, [other for other in others if "." not in other.partition("=")[0]], []):
        try:
            cfg = compose(some)
            break
        except MISTAKES:  # a second mistake, which the next attempt shows
            continue
    else:
        return f"+{argument} adds it"
    option, options = cfg.hydra.runtime.choices.get(group), options_with(group, rest) if rest else []
    if options and option not in options:
        return f"{group}={option} has none, {group}={f', {group}='.join(options)} {'has' if len(options) == 1 else 'have'}"
    names = [name for name in _names(OmegaConf.to_container(cfg, resolve=False)) if name.startswith("hydra.") == key.startswith("hydra.")]
    last = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    longer = [name for name in names if last in name.rpartition(".")[2]]
    near = list(dict.fromkeys(same or difflib.get_close_matches(key, names, SHOWN) + longer))[:SHOWN]
    return f"near: {', '.join(near)}" if near else f"+{argument} adds it"


def _names(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted name of every key below a node."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _names(value, f"{prefix}{key}.")


def _options_with(loader: ConfigLoaderImpl, group: str, key: str) -> list[str]:
    """The options of a group whose own file has a key; all for an empty one."""
    found = []
    for option in loader.get_group_options(group, ObjectType.CONFIG):
        file = loader.repository.load_config(f"{group}/{option}")
        if file is not None and OmegaConf.select(file.config, key) is not None:
            found.append(option)
    return found
