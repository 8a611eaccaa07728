"""Suggest our settings to users who type settings of other tools."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields

from hydra._internal.utils import get_args_parser

from qat.errors import UsageError
from qat.spec import ALIASES
from qat.tasks.conf import options, unused_settings
from qat.tasks.settings import COMMANDS

# Our settings, and their names in other tools. A name without a group is recognized at the top
# level and in the group of our setting.
OTHER_NAMES = {
    "ckpt": "checkpoint checkpoint_path resume_from load_from",
    "run_dir": "output output_dir out_dir save_dir work_dir",
    "data.root": "path dir folder data_path data_dir data_root",
    "data.image_size": "img_size imgsz input_size image_size model.img_size model.image_size",
    "data.batch_size": "batch bs batch_size train_batch_size",
    "data.num_workers": "workers num_workers",
    "data.num_classes": "num_classes n_classes model.num_classes",
    "model.name": "arch model_name",
    "model.pretrained": "pretrained",
    "optimizer.lr": "lr learning_rate",
    "optimizer.weight_decay": "wd weight_decay",
    **{f"quant.{knob}": f"{knob} {names}" for knob, names in ALIASES.items()},
    "trainer.devices": "gpus devices num_gpus",
    "trainer.max_epochs": "epochs num_epochs n_epochs max_epochs",
    "trainer.precision": "precision dtype",
}
OUR_NAMES = {name: setting for setting, names in OTHER_NAMES.items() for name in names.split()}
SWITCH_OFF = {"logger": "~logger", "callbacks": "~callbacks", "quant": "quant=fp"}
OFF_VALUES = {"null", "none", "false", "off"}
WEIGHT_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


def parse_arguments(arguments: Sequence[str], command: str) -> Namespace:
    """Parse a command line as Hydra does.

    Settings are typed as `name=value`, and Hydra's options must not separate them.

    Raises:
        UsageError: there is `--name value`, or an option such as `-m` between settings.
    """
    parsed, flags = get_args_parser().parse_known_args(arguments)
    if not flags:
        return parsed
    flag = flags[0]
    if not flag.startswith("-"):
        raise UsageError(f"{flag}: options such as -m must come before all settings")
    later_arguments = arguments[arguments.index(flag) + 1 :]
    name, _, value = flag.lstrip("-").partition("=")
    name = name.replace("-", "_")
    has_value = (
        later_arguments and not later_arguments[0].startswith("-") and "=" not in later_arguments[0]
    )
    if value == "" and has_value:
        value = later_arguments[0]
        flag = f"{flag} {value}"
    our_name = _our_names(command).get(name, name)
    raise UsageError(f"{flag}: must be {our_name}={value or 'VALUE'}")


def suggest_correction(arguments: Sequence[str], command: str) -> str | None:
    """Message about the first argument that is written as in another tool, or None.

    Call this function if Hydra cannot compose a config.
    """
    names = _our_names(command)
    for argument in arguments:
        setting, equals, value = argument.partition("=")
        if not equals:
            continue
        replacement = _replacement(setting.lstrip("+"), value, names)
        if replacement is not None:
            return f"{argument}: must be {replacement}"
    return None


def _replacement(setting: str, value: str, names: Mapping[str, str]) -> str | None:
    if setting in SWITCH_OFF and value.lower() in OFF_VALUES:
        return SWITCH_OFF[setting]
    if value in options(setting):
        return None
    if setting == "data" and (os.path.isdir(os.path.expanduser(value)) or "/" in value):
        return f"data=imagefolder data.root={value}"
    if setting == "model" and value.endswith(WEIGHT_SUFFIXES):
        return f"ckpt={value}"
    if setting == "teacher" and value.endswith(WEIGHT_SUFFIXES):
        return f"teacher.ckpt={value}"
    if setting == "optimizer":
        from timm.optim import list_optimizers

        return f"optimizer.opt={value}" if value in list_optimizers() else None
    if setting in {"quant", "ptq"}:
        return _suggest_recipes(setting, value)
    name = _our_name(setting, names)
    return f"{name}={value}" if name and name != setting else None


def _our_names(command: str) -> dict[str, str]:
    """Settings of a command by their names in other tools."""
    if command == "train":
        return OUR_NAMES
    groups = {field.name for field in fields(COMMANDS[command])}
    unused = unused_settings(command)
    names = {}
    for other, name in OUR_NAMES.items():
        group, _, knob = name.partition(".")
        if group == "quant" and command == "ptq":
            names[other] = names[name] = f"ptq.{knob}"
        elif group in groups and name not in unused:
            names[other] = name
    return names


def _our_name(setting: str, names: Mapping[str, str]) -> str:
    """Our name of a setting, found by its full name or its name in the group; "" if unknown."""
    if setting in names:
        return names[setting]
    group, _, last_part = setting.rpartition(".")
    name = names.get(last_part, "")
    return name if name.partition(".")[0] == group else ""


def _suggest_recipes(group: str, value: str) -> str | None:
    """Recipes with the bits in a name such as `w4a8` or `int4`, as one text; None if none fit."""
    match = re.fullmatch(r"(?:w|int|q)?(\d)(?:_?a(\d)|bits?)?", value.lower())
    if match is None:
        return None
    weight_bits = match[1]
    act_bits = match[2] or weight_bits
    names = [f"deploy_w{weight_bits}a{act_bits}", f"reconstruct_w{weight_bits}a{act_bits}"]
    if weight_bits == act_bits:
        names += [f"seq_{weight_bits}bit", f"minmax_{weight_bits}bit"]
    choices = [f"{group}={name}" for name in names if name in options(group)]
    return " or ".join(choices) or None
