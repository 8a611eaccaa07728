"""Corrections of arguments: settings by their names in other tools, and misplaced values."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from qat.errors import UsageError
from qat.spec import ALIASES
from qat.tasks.conf import options

# Settings, and their names in other tools, with or without the group.
NAMES = {
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
OURS = {name: setting for setting, names in NAMES.items() for name in names.split()}
OFF = {"logger": "~logger", "callbacks": "~callbacks", "quant": "quant=fp"}
NOTHING = {"null", "none", "false", "off"}
WEIGHTS = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


def refuse_flags(arguments: Sequence[str]) -> None:
    """Raise `UsageError` on `--name value`: settings are typed as `name=value`."""
    flags = get_args_parser().parse_known_args(arguments)[1]
    if not flags:
        return
    flag = flags[0]
    following = arguments[arguments.index(flag) + 1 :]
    name, _, value = flag.lstrip("-").replace("-", "_").partition("=")
    if value == "" and following and not following[0].startswith("-") and "=" not in following[0]:
        value = following[0]
        flag = f"{flag} {value}"
    raise UsageError(f"{flag}: must be {OURS.get(name, name)}={value or 'VALUE'}")


def correction(arguments: Sequence[str]) -> str | None:
    """The error for the first argument that is written as in other tools, if any.

    It is called when a config cannot be composed.
    """
    for argument in arguments:
        setting, equals, value = argument.partition("=")
        if not equals:
            continue
        corrected = _corrected(setting.lstrip("+"), value)
        if corrected is not None:
            return f"{argument}: must be {corrected}"
    return None


def _corrected(setting: str, value: str) -> str | None:
    """The argument to write; None if it is correct or unknown."""
    if setting in OFF and value.lower() in NOTHING:
        return OFF[setting]
    if value in options(setting):
        return None
    if setting == "data" and (os.path.isdir(os.path.expanduser(value)) or "/" in value):
        return f"data=imagefolder data.root={value}"
    if setting in {"model", "teacher"} and value.endswith(WEIGHTS):
        return f"ckpt={value}" if setting == "model" else f"teacher.ckpt={value}"
    if setting == "optimizer":
        from timm.optim import list_optimizers

        return f"optimizer.opt={value}" if value in list_optimizers() else None
    if setting in {"quant", "ptq"}:
        return _recipes_of_bits(setting, value)
    group, _, name = setting.rpartition(".")
    ours = OURS.get(setting) or OURS.get(name, "")
    is_known = setting in OURS or (ours and group == ours.partition(".")[0])
    return f"{ours}={value}" if is_known and ours != setting else None


def _recipes_of_bits(group: str, value: str) -> str | None:
    """Recipes for a name that only states bits, such as `w4a8` or `int4`."""
    bits = re.fullmatch(r"(?:w|int|q)?(\d)(?:_?a(\d)|bits?)?", value.lower())
    if bits is None:
        return None
    weight = bits[1]
    act = bits[2] or weight
    names = [f"deploy_w{weight}a{act}", f"reconstruct_w{weight}a{act}"]
    if weight == act:
        names += [f"seq_{weight}bit", f"minmax_{weight}bit"]
    choices = [f"{group}={name}" for name in names if name in options(group)]
    return " or ".join(choices) or None
