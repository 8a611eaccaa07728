"""`conf/` for Hydra: where it is, the schemas of its roots, and the functions that its files call as `${name:arguments}`.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import datetime
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qat.launch import ranks, slurm
from qat.tasks.settings import COMMANDS

# In a clone a link to the folder at the top.
CONF = (Path(__file__).parents[1] / "conf").resolve()
SWIN_STAGES = 4
# Arguments of Lightning's trainer that evaluation has no use for.
OF_TRAINING = (
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "limit_train_batches",
    "log_every_n_steps",
    "num_sanity_val_steps",
)


def typed(name: str) -> str:
    """A command as it is typed here: `qat train`, or `python train.py`."""
    return f"qat {name}" if Path(sys.argv[0]).name == "qat" else f"python {name}.py"


def recorded(cfg: DictConfig) -> str:
    """The text of `config.yaml`: every value as it was, as a record."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return OmegaConf.to_yaml(
        OmegaConf.create({key: value for key, value in values.items() if key != "sweep_dir"})
    )


def options(group: str) -> list[str]:
    """The choices of a group; files whose names begin with an underscore are parts of others."""
    return sorted(
        path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_")
    )


def yaml_lines(text: str) -> Iterator[tuple[str, str, str]]:
    """Lines of YAML, each with the dotted name of its setting and the comment after or above it; both are empty where there is none."""
    parents: dict[int, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        found, comment = re.match(r"( *)(\w+):", line), re.findall(r"(?:^| )# (.*)", line)
        if found:
            parents = {indent: key for indent, key in parents.items() if indent < len(found[1])} | {
                len(found[1]): found[2]
            }
        yield line, ".".join(parents.values()) if found else "", " ".join(comment or above)
        above = [] if found or not comment else above + comment


def config_groups(*, _root_: DictConfig) -> str:
    """A line for each group of a command and its choices, for `--help`; of experiments those that change nothing but these groups."""
    groups = {name for name in _root_.hydra.runtime.choices if name.isidentifier()}
    listed = {
        name: [one for one in options(name) if name != "experiment" or _overridden(one) <= groups]
        for name in sorted(groups)
    }
    return "\n".join(f"{name}: {', '.join(choices)}" for name, choices in listed.items())


def _overridden(experiment: str) -> set[str]:
    """Groups that an experiment, or one that it is made of, chooses from."""
    held: Any = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml"))
    groups = {
        key.removeprefix("override /")
        for entry in held.get("defaults", [])
        if isinstance(entry, dict)
        for key in entry
    }
    parts = [
        entry for entry in held.get("defaults", []) if isinstance(entry, str) and entry != "_self_"
    ]
    return groups.union(*map(_overridden, parts))


def config_in_words(*, _root_: DictConfig) -> str:
    """The settings of a command, each with its comment in `conf/`, for `--help`; those of training only for `train`."""
    said: dict[str, str] = {}
    command = CONF / f"{_root_.command}.yaml"
    for path in (command, *sorted(CONF.glob("*/**/*.yaml")), *sorted(CONF.glob("*.yaml"))):
        for line, name, words in yaml_lines(path.read_text(encoding="utf-8")):
            is_group = re.fullmatch(
                r"\w+:( *#.*)?", line
            )  # another command's words for a whole group do not apply
            if name and words and not (is_group and path.parent == CONF and path != command):
                said.setdefault(".".join([*path.relative_to(CONF).parts[:-1], name]), words)
    own = [
        key
        for key in map(str, _root_)
        if not key.startswith(("hydra", "command", "sweep_dir", "default_"))
    ]
    hidden = {f"trainer.{name}" for name in OF_TRAINING if _root_.command != "train"}
    lines = (
        one
        for one in yaml_lines(OmegaConf.to_yaml(OmegaConf.masked_copy(_root_, own)))
        if one[1] not in hidden
    )
    return "\n".join(
        f"{line}  # {said[name]}" if name in said else line for line, name, _ in lines
    ).replace("$", "$$")


def alias(name: str, args: Mapping[str, Any]) -> str:
    """A net of timm with the arguments of a choice of `model=` that has some of its own, by the name of that; others by timm's."""
    for choice in options("model"):
        held: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{choice}.yaml"))
        if held["name"] == name and (own := held.get("args")) and own.items() <= args.items():
            return f"{choice} ({name})"
    return name


def run_name() -> str:
    """The job of SLURM, else date and time, the same in all processes of a run."""
    job = os.environ.get("SLURM_JOB_ID")
    return (
        f"slurm-{job}"
        if job
        else ranks.broadcast_value(f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    )


def swin_patch(image_size: int, wanted: int | None) -> int:
    """Patch of a Swin, in pixels: the one wanted (4 if that is None), halved until its four stages have something to merge."""
    patch = wanted or 4
    while patch > 1 and image_size // patch < 2 ** (SWIN_STAGES - 1):
        patch //= 2
    return patch


def swin_window(image_size: int, patch: int, own: int) -> int:
    """Window of a Swin, in patches: its own, or the largest below it that divides the side of the map; shifting needs two windows."""
    side = image_size // patch
    return next(
        (
            window
            for window in (own, *range(own - 1, 1, -1))
            if side % window == 0 and window < side
        ),
        own,
    )


def timm_argument(model: str, name: str, value: Any) -> Any:
    """The value for an argument of `timm.create_model`; None where the classes of the model's family do not take it."""
    import timm

    if not timm.is_model(model):
        return None  # which is an error later
    family = vars(sys.modules[timm.model_entrypoint(model).__module__]).values()
    signatures = [
        inspect.signature(one).parameters
        for one in family
        if inspect.isclass(one) and one.__module__.startswith("timm.models")
    ]
    return (
        value if any({name, "num_classes"} <= set(signature) for signature in signatures) else None
    )


def none_of(*values: object) -> bool:
    """True if no value is set: a recipe's own start gives way to another one, and to a dry run that downloads nothing."""
    return not any(values)


def pick(net: str | None, bits: int, table: Mapping[str, Any]) -> Any:
    """What a published recipe has for a net and a width: `{deit_t:140,deit_s:{2:140,3:100}}`.

    Raises:
        ValueError: there is no such row; OmegaConf's error names the setting.
    """
    rows = table.get(net) if net is not None else None
    found = rows.get(bits) if isinstance(rows, Mapping) else rows
    if found is None:
        raise ValueError(
            f"no published row of this model at {bits} bits; model must be one of {', '.join(table)}"
        )
    return found


def _register() -> None:
    functions: tuple[Callable[..., Any], ...] = (
        *(
            typed,
            config_groups,
            config_in_words,
            swin_patch,
            swin_window,
            timm_argument,
            none_of,
            pick,
        ),
        *(slurm.slurm_tasks_per_node, slurm.slurm_nodes),
    )
    for function in functions:
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"_{name}", node=schema, provider="qat")
    # Any argument of Lightning's trainer goes without a plus.
    store.store(
        group="trainer",
        name="_lightning",
        node=DictConfig({}, flags={"struct": False}),
        provider="qat",
    )


_register()
