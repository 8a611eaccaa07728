"""`config.yaml` of a run as the input of a command: it may be anybody's, so it is looked at before Hydra makes anything of it.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qat.cli.repeat import CONF, DEFAULTS, FOLLOWS, IN_FILE, MARK
from qat.errors import UsageError

NAME = "config"
# What a recorded reference may call; `oc.env` and the like would bring in what is not in the file.
CALLED = {"run_name", "writable", "none_of", "swin_patch", "swin_window", "slurm_nodes", "slurm_tasks_per_node", "oc.select"}
# Classes of these folders do nothing but what they are there for; of other modules a name may lead anywhere (`callbacks.timer.os.system`).
BUILT_IN = re.compile(r"(lightning\.pytorch\.callbacks|qat\.(callbacks|data|losses))\.[A-Z]\w*")
_CALL = re.compile(re.escape(IN_FILE) + r"\s*([^{}:]*):")


def check_repeated(arguments: Sequence[str]) -> None:
    """Look at the `config.yaml` that a command line takes its settings from; do nothing where it takes them from `conf/`.

    A file by itself imports nothing and calls nothing: what it names has to be built in, or of a module that `model.imports=[...]` of the
    command line names.

    Args:
        arguments: of the command line.

    Raises:
        UsageError: the file cannot be read, or names anything else.
    """
    path = _repeated(arguments)
    if path is None:
        return
    from qat.utils.bounds import read_yaml  # with it comes torch

    try:
        content, _ = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as the settings of a run ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or content.get("defaults") != DEFAULTS or "hydra" in content:
        raise UsageError(f"{path}: must be as a run has written it: its defaults or its settings of Hydra are not")
    beside = next((found for group in CONF.iterdir() for found in (path.parent / group.name).rglob("*.yaml") if group.is_dir()), None)
    if beside is not None:
        raise UsageError(f"{path}: must not have config files beside it, which would take the place of conf/: {beside}")
    _check_references(path, content)
    _check_names(path, content, _typed_imports(arguments))


def _repeated(arguments: Sequence[str]) -> Path | None:
    """The file, if the command line names one as a run's: `--config-dir RUN --config-name config`."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default="")
    parser.add_argument("--cfg", "-c")
    try:
        given, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # Hydra says what is wrong
        return None
    name = given.config_name.removesuffix(".yaml")
    if Path(name).name != NAME:
        return None
    folders = [Path(given.config_path)] if given.config_path else []
    folders += [Path(given.config_dir)] if given.config_dir else []
    return next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)


def _typed_imports(arguments: Sequence[str]) -> list[str]:
    """Modules of `model.imports=[...]`."""
    typed = [one.partition("=")[2] for one in arguments if one.lstrip("+").startswith("model.imports=")]
    try:
        found = [yaml.safe_load(one) for one in typed]
    except yaml.YAMLError:  # Hydra says what is wrong
        return []
    return [name for names in found if isinstance(names, list) for name in names if isinstance(name, str)]


def _check_references(path: Path, content: dict[str, Any]) -> None:
    follows = content.get(FOLLOWS, {})
    if not isinstance(follows, dict) or any(MARK in str(value) for _, value in _leaves(content)):
        raise UsageError(f"{path}: must be as a run has written it: it has references among its settings")
    for key, reference in follows.items():
        for called in _CALL.findall(str(reference)):
            if called.strip() not in CALLED:
                raise UsageError(f"{path}: {key} must not call {called.strip()!r}; a run's settings follow each other alone")


def _check_names(path: Path, content: dict[str, Any], imports: Sequence[str]) -> None:
    """Raise `UsageError` unless what the settings name as code is in `conf/`, or in a module of `imports`."""
    known: set[str] | None = None
    for key, value in _leaves(content):
        names_class = key[-1] == "_target_" or (key[-1].endswith("_quantizer") and ":" in str(value))
        if not names_class and "imports" not in key[-2:]:
            continue
        if value is None or any(str(value) == one or str(value).startswith((f"{one}.", f"{one}:")) for one in imports):
            continue
        if key[-1] == "_target_" and BUILT_IN.fullmatch(str(value)):
            continue
        known = _named_in_conf() if known is None else known
        if key[-1] != "_target_" or value not in known:
            hint = f"model.imports=[{str(value).replace(':', '.').rpartition('.')[0] or value}]"
            raise UsageError(f"{path}: {'.'.join(key)}={value!r} must be built in, or of a module of the command line: {hint}")


def _named_in_conf() -> set[str]:
    files = [path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml")]
    return {target for text in files for target in re.findall(r"_target_:\s*([\w.]+)", text)}


def _leaves(node: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Keys and values below a node; entries of a list have their number as key."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if pairs is None:
        yield key, node
        return
    if key and key[-1] == "_target_":  # a class has one name
        yield key, repr(node)
    for name, below in pairs:
        yield from _leaves(below, (*key, str(name)))
