"""The command line before Hydra reads it: paths as people type them, and mistakes that Hydra answers at length. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from qat.cli.repeat import CONF
from qat.errors import UsageError

PATHS = ("ckpt", "teacher.ckpt", "model.weights", "data.root", "predict", "run", "sweep", "file")
# What stands for itself in Hydra's grammar.
_PLAIN = re.compile(r"[A-Za-z0-9_./:+%@-]*")
# What makes a sweep of a value under `--multirun`.
_SWEEP = re.compile(r",|\b(choice|range|interval|glob|tag|sort|shuffle)\(")
HUB = "hf-hub:"
_CONFIG_PATH = ("--config-path", "-cp")
# Arguments that were known once, and what to use instead; `conf/` says what there is now.
REPLACED = {
    r"callbacks\.finite\.(policy|max_rollbacks)=.*": "a non-finite loss ends the run; resume=true goes on from the last good checkpoint",
    r"search=bits": "analyze.py analysis=sensitivity analysis.budget_mb=MB gives the overrides of a mixed net",
    r"opset=.*": "the lowest opset that has all types is written",
    r"analysis\.activations=.*": "analysis.activation_images=0 reads no image",
    r"analysis\.factors=.*": "a folded matrix is listed as it is quantized, without the weights that it is made of",
    r"analysis\.compare=.*": "the net in float is always beside the quantized one",
    r"experiment=ofq_(deit_[ts]|swin_t)_(w\da\d(_cga)?)": r"experiment=ofq_\2 model=\1",
    r"experiment=evolq_((deit|vit)_[tsb])_(w\da\d)": r"experiment=evolq_\3 model=\1",
}


def prepared(arguments: Sequence[str]) -> list[str]:
    """The arguments with `~` in front of a path expanded, and paths quoted where Hydra's grammar would not take them as they are.

    A relative `--config-path` counts from the present folder, as `--config-dir` does, and not from where the command is installed.
    """
    is_multirun = any(one in {"-m", "--multirun"} for one in arguments)
    done = [_prepared(one, is_multirun=is_multirun) for one in arguments]
    for i, one in enumerate(done):
        flag, equals, value = one.partition("=")
        if flag in _CONFIG_PATH and equals:
            done[i] = f"{flag}={os.path.abspath(value)}"
        elif i and done[i - 1] in _CONFIG_PATH:
            done[i] = os.path.abspath(one)
    return done


def _prepared(argument: str, *, is_multirun: bool) -> str:
    key, equals, value = argument.partition("=")
    value = _at_home(value) if equals else value
    if key.lstrip("+") not in (*PATHS, "run_dir") or (is_multirun and _SWEEP.search(value)):
        return f"{key}{equals}{value}"
    if key.lstrip("+") == "ckpt" and re.fullmatch(r"\[.*\]", value) and not os.path.exists(value):  # nets to compare
        return f"{key}=[{','.join(_quoted(_at_home(one.strip())) for one in value[1:-1].split(','))}]"
    return f"{key}{equals}{_quoted(value)}"


def _at_home(path: str) -> str:
    return re.sub(r"^~(?=/|$)", lambda _: os.path.expanduser("~"), path)


def _quoted(value: str) -> str:
    """A path as Hydra's grammar takes it; what is quoted or interpolated stays as it is."""
    if value[:1] in {"'", '"'} or "${" in value or _PLAIN.fullmatch(value):
        return value
    # Backslashes count only in front of a quote.
    inner = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{inner}'"


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with `model=hf-hub:user/name` as the settings that it stands for."""
    parts = [(one, *one.lstrip("+").partition("=")) for one in arguments]
    return [
        word
        for one, key, _, value in parts
        for word in (["model=_hub", f"model.name={value}"] if key == "model" and value.startswith(HUB) else [one])
    ]


def check(arguments: Sequence[str]) -> None:
    """Answer what Hydra answers with a traceback or a page.

    Raises:
        UsageError: a choice that there is not in `conf/`, or a setting that has gone.
    """
    has_more_folders = any(one.startswith(("--config", "-c", "hydra.searchpath")) for one in arguments)
    for argument in arguments:
        typed = argument.lstrip("+")
        for pattern, successor in REPLACED.items():
            if (found := re.fullmatch(pattern, typed)) is not None:
                raise UsageError(f"{argument}: is gone; instead: {found.expand(successor)}")
        group, equals, choice = typed.partition("=")
        if equals and not group.startswith("hydra/") and (CONF / group).is_dir():  # of those Hydra's plugins have more
            _check_choice(group, choice, has_more_folders=has_more_folders)


def _check_choice(group: str, choice: str, *, has_more_folders: bool) -> None:
    if choice == "null":
        raise UsageError(f"{group}=null: must be the name of a file in conf/{group}; ~{group} leaves it out")
    known = options(group)
    for name in re.fullmatch(r"\[?(.*?)\]?", choice)[1].split(","):  # type: ignore[index]
        is_name = re.fullmatch(r"[\w-]+", name.strip()) is not None
        if is_name and name.strip() not in known and (name.strip().startswith("_") or not has_more_folders):
            raise UsageError(f"{group}={name.strip()}: must be one of {', '.join(known)}")


def options(group: str) -> list[str]:
    """The choices of a group; files whose names begin with an underscore are parts of others."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))


def groups() -> str:
    """A line for each group and its choices, for `--help`."""
    folders: Iterable[str] = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    return "\n".join(f"{name}: {', '.join(options(name))}" for name in folders)
