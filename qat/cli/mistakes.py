"""Known mistakes: errors that are printed as one line, without a traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from qat.errors import UsageError
from qat.tasks.conf import INTERNAL, options, unused_settings, yaml_lines
from qat.utils.validate import unknown_message

ANY_MODEL = "; any model of timm: model=NAME, or model=hf-hub:timm/NAME"


def error_line(error: BaseException | None) -> str | None:
    """Return the line to print for a known mistake, or None for any other error.

    Hydra wraps errors of constructors, so the mistake may be the `__cause__` of an error. Errors
    that Hydra or Lightning raise themselves are known mistakes, too.
    """
    while error is not None:
        for kinds, describe in _KNOWN_MISTAKES:
            line = describe(error) if isinstance(error, kinds) else None
            if line is not None:
                return line
        package, _, _ = type(error).__module__.partition(".")
        if error.__cause__ is None and package in {"hydra", "lightning"}:
            return _one_line(error)
        error = error.__cause__
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unknown_choice(error: MissingConfigException) -> str | None:
    if error.missing_cfg_file is None:
        return None
    group, _, name = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
    line = unknown_message(f"{group}={name}", name, options(group))
    return line + ANY_MODEL if group == "model" else line


def _unknown_setting(error: ConfigKeyError | ConfigAttributeError) -> str | None:
    group = error.parent_node
    if group is None:
        return None
    siblings = []
    if OmegaConf.is_dict(group):
        siblings = [str(name) for name in group if not str(name).startswith(INTERNAL)]
    root = group._get_root()
    unused = unused_settings(root.get("command"))
    names = []
    for _, name, _ in yaml_lines(OmegaConf.to_yaml(root)):
        if not name.startswith((*INTERNAL, "callbacks")) and name not in unused:
            names.append(name)
    return unknown_message(str(error.full_key or error.key), str(error.key), siblings, names)


def _wrong_value(error: OmegaConfBaseException) -> str:
    """The reason in an OmegaConf error's first line, with the setting's name if known."""
    first_line = str(error).partition("\n")[0]
    _, _, reason = first_line.rpartition(" raised while resolving interpolation: ")
    name = str(error.full_key or "")
    return reason if name in reason else f"{name}: {reason}"


def _wrong_file(error: OSError) -> str | None:
    is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if not error.filename and not is_full:
        return None
    return f"{error.filename or 'a file'}: cannot be read or written ({error.strerror})"


def _line_if_matching(pattern: str, line: str) -> Callable[[BaseException], str | None]:
    """Return a function that returns `line` for errors that match `pattern`, else None.

    `{}` in the line is replaced by the error's text.
    """

    def describe(error: BaseException) -> str | None:
        text = _one_line(error)
        return line.format(text) if re.search(pattern, text) else None

    return describe


# Types of errors, and functions that return the line for an error of this type, or None if the
# error is unknown.
_KNOWN_MISTAKES: tuple[tuple[Any, Callable[[Any], str | None]], ...] = (
    (UsageError, _one_line),
    (MissingConfigException, _unknown_choice),
    ((ConfigKeyError, ConfigAttributeError), _unknown_setting),
    (OmegaConfBaseException, _wrong_value),
    (
        (OSError, RuntimeError),
        _line_if_matching(
            r"[Tt]oo many open files|received 0 items of ancdata",
            "too many open files; lower data.num_workers, or raise the limit (ulimit -n)",
        ),
    ),
    (OSError, _wrong_file),
    (
        RuntimeError,
        _line_if_matching(
            r"^DataLoader worker \(pid",
            "{}; memory may be short: lower data.num_workers or data.batch_size, "
            "or raise --shm-size of Docker",
        ),
    ),
    (
        RuntimeError,
        _line_if_matching(
            r"[Cc]onnection (closed|reset) by peer|remote process exited"
            r"|Broken pipe|failed to recv",
            "another process of this run has ended: {}",
        ),
    ),
    (RuntimeError, _line_if_matching(r"^Early stopping conditioned on", "{}")),
)
