"""The folder `conf/` for Hydra: path, schemas and resolvers.

Resolvers are functions that YAML files call as `${name:arguments}`. Nothing heavy is imported
here, so that `--help` is fast.
"""

from __future__ import annotations

import datetime
import functools
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qat.launch import ranks, slurm
from qat.tasks.settings import COMMANDS

# In a clone, `qat/conf` is a link to the top-level folder `conf/`.
CONF = (Path(__file__).parents[1] / "conf").resolve()
SWIN_STAGES = 4
# Prefixes of names in a config that are not for users.
INTERNAL = ("hydra", "command", "sweep_dir", "default_")
# Arguments of Lightning's trainer that only training uses.
TRAINING_ARGUMENTS = (
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "limit_train_batches",
    "log_every_n_steps",
    "num_sanity_val_steps",
)


def command_words(name: str) -> str:
    """The words with which the user starts a command: `qat train`, or `python train.py`."""
    return f"qat {name}" if Path(sys.argv[0]).name == "qat" else f"python {name}.py"


def config_text(cfg: DictConfig) -> str:
    """The config without `sweep_dir` as text for `config.yaml`, with interpolations resolved."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    values.pop("sweep_dir", None)
    return OmegaConf.to_yaml(OmegaConf.create(values))


def options(group: str) -> list[str]:
    """The choices of a group, without files that are parts of other files (`_NAME.yaml`)."""
    names = [path.stem for path in (CONF / group).glob("*.yaml")]
    return sorted(name for name in names if not name.startswith("_"))


@functools.cache
def values_of(group: str, choice: str) -> Mapping[str, Any]:
    """The values in the file of a choice; a process reads each file once."""
    values: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
    return types.MappingProxyType(values)


def yaml_lines(text: str) -> Iterator[tuple[str, str, str]]:
    """Read lines of YAML with their settings and comments.

    Yields:
        The line, the dotted name of its setting, and the comment after or above it; name and
        comment may be empty.
    """
    keys_by_indent: dict[int, str] = {}
    comments_above: list[str] = []
    for line in text.splitlines():
        key = re.match(r"( *)(\w+):", line)
        comment = re.search(r"(?:^| )# (.*)", line)
        comments = [comment[1]] if comment else []
        name = ""
        if key:
            spaces = len(key[1])
            keys_by_indent = {n: parent for n, parent in keys_by_indent.items() if n < spaces}
            keys_by_indent[spaces] = key[2]
            name = ".".join(keys_by_indent.values())
        yield line, name, " ".join(comments or comments_above)
        if key or not comments:
            comments_above = []
        else:
            comments_above = comments_above + comments


def config_groups(*, _root_: DictConfig) -> str:
    """A line for each group of a command with its choices, for `--help`.

    An experiment that overrides a group that the command lacks is left out.
    """
    groups = {name for name in _root_.hydra.runtime.choices if name.isidentifier()}
    lines = []
    for group in sorted(groups):
        choices = options(group)
        if group == "experiment":
            choices = [name for name in choices if _overridden_groups(name) <= groups]
        lines.append(f"{group}: {', '.join(choices)}")
    return "\n".join(lines)


def _overridden_groups(experiment: str) -> set[str]:
    """Groups that an experiment overrides, itself or through experiments that it is based on."""
    groups: set[str] = set()
    for entry in values_of("experiment", experiment).get("defaults", []):
        if isinstance(entry, dict):
            groups |= {key.removeprefix("override /") for key in entry}
        elif isinstance(entry, str) and entry != "_self_":
            groups |= _overridden_groups(entry)
    return groups


def unused_settings(command: str) -> set[str]:
    """Settings in the config of a command that only training uses; `--help` hides them."""
    if command == "train":
        return set()
    return {f"trainer.{name}" for name in TRAINING_ARGUMENTS}


def config_in_words(*, _root_: DictConfig) -> str:
    """Settings of a command for `--help`, with their comments in `conf/`."""
    comments = _setting_comments(_root_.command)
    names = [str(name) for name in _root_]
    own_names = [name for name in names if not name.startswith(INTERNAL)]
    hidden_names = unused_settings(_root_.command)
    lines = []
    for line, name, _ in yaml_lines(OmegaConf.to_yaml(OmegaConf.masked_copy(_root_, own_names))):
        if name in hidden_names:
            continue
        lines.append(f"{line}  # {comments[name]}" if name in comments else line)
    # Hydra substitutes `$NAME` in the text.
    return "\n".join(lines).replace("$", "$$")


def _setting_comments(command: str) -> dict[str, str]:
    """The comments of all settings, from the command's own file, or else from another file."""
    own_file = CONF / f"{command}.yaml"
    comments: dict[str, str] = {}
    for path in (own_file, *sorted(CONF.glob("*/**/*.yaml")), *sorted(CONF.glob("*.yaml"))):
        groups = path.relative_to(CONF).parts[:-1]
        for line, name, comment in yaml_lines(path.read_text(encoding="utf-8")):
            is_group = re.fullmatch(r"\w+:( *#.*)?", line)
            # A command's comment on a whole group does not apply to other commands.
            belongs_to_other_command = is_group and path.parent == CONF and path != own_file
            if name and comment and not belongs_to_other_command:
                comments.setdefault(".".join([*groups, name]), comment)
    return comments


def display_name(name: str, args: Mapping[str, Any]) -> str:
    """The name by which users know a model.

    If a choice of `model=` has this name and arguments of this model, the name of the choice comes
    first: `CHOICE (NAME)`. A model of Transformers is named by its class.

    Args:
        name: name for `timm.create_model`.
        args: arguments of the model.
    """
    if "architecture" in args:
        return f"{args['architecture']} of Transformers"
    for choice in options("model"):
        values = values_of("model", choice)
        choice_args = values.get("args")
        if values["name"] == name and choice_args and choice_args.items() <= args.items():
            return f"{choice} ({name})"
    return name


def run_name() -> str:
    """The id of the SLURM job, or else date and time; equal in all processes of a run."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id:
        return f"slurm-{job_id}"
    return ranks.broadcast_value(f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")


def swin_patch(image_size: int, own_patch: int | None) -> int:
    """The patch size of a Swin in pixels: its own (4 if None), or smaller for small images.

    The size is halved until each of the four stages has a patch, or the size is 1.
    """
    patch = own_patch or 4
    while patch > 1 and image_size // patch < 2 ** (SWIN_STAGES - 1):
        patch //= 2
    return patch


def swin_window(image_size: int, patch: int, own_window: int) -> int:
    """The window size of a Swin in patches: its own, or the largest smaller size that fits.

    A window fits if its size divides the side of the feature map and is smaller than this side,
    because shifting needs two windows. If no size above 1 fits, `own_window` is returned.
    """
    side = image_size // patch
    for window in (own_window, *range(own_window - 1, 1, -1)):
        if side % window == 0 and window < side:
            return window
    return own_window


def timm_argument(model: str, name: str, value: Any) -> Any:
    """Return `value` if a model class in the module of this timm model takes `name`, else None."""
    import timm

    if not timm.is_model(model):
        return None  # an unknown model becomes an error later
    family = sys.modules[timm.model_entrypoint(model).__module__]
    for member in vars(family).values():
        if not inspect.isclass(member) or not member.__module__.startswith("timm.models"):
            continue
        # Only classes of models take num_classes; classes of their layers do not.
        if {name, "num_classes"} <= set(inspect.signature(member).parameters):
            return value
    return None


def none_of(*values: object) -> bool:
    """True if all values are falsy. Configs use this to fall back on pretrained weights."""
    return not any(values)


def pick(net: str | None, bits: int, table: Mapping[str, Any]) -> Any:
    """The entry of a published recipe for a model and a bit-width.

    Args:
        net: name of the model.
        bits: bit-width.
        table: entries by model, or by model and bit-width: `{deit_t:140,deit_s:{2:140,3:100}}`.

    Raises:
        ValueError: the table has no such entry; OmegaConf adds the setting's name.
    """
    entry = table.get(net) if net is not None else None
    if entry is None:
        raise ValueError(f"no published settings; model must be one of {', '.join(table)}")
    if not isinstance(entry, Mapping):
        return entry
    if bits not in entry:
        allowed = ", ".join(map(str, entry))
        raise ValueError(
            f"no published settings for model={net} at quant.bits={bits}; must be one of {allowed}"
        )
    return entry[bits]


def _register() -> None:
    functions: tuple[Callable[..., Any], ...] = (
        command_words,
        config_groups,
        config_in_words,
        swin_patch,
        swin_window,
        timm_argument,
        none_of,
        pick,
        slurm.slurm_tasks_per_node,
        slurm.slurm_nodes,
    )
    # OmegaConf 2.4 deprecates `register_new_resolver` in favour of `register_resolver`. In older
    # versions, `register_resolver` is a different function.
    register: Any = OmegaConf.register_resolver
    if "replace" not in inspect.signature(register).parameters:
        register = OmegaConf.register_new_resolver
    for function in functions:
        register(function.__name__, function, replace=True)
    register("run_name", run_name, use_cache=True, replace=True)
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"_{name}", node=schema, provider="qat")
    # This allows setting any argument of Lightning's trainer without a plus.
    store.store(
        group="trainer",
        name="_lightning",
        node=DictConfig({}, flags={"struct": False}),
        provider="qat",
    )


_register()
