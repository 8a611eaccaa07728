"""Settings that Lightning or Python would take and then train on nothing, or fail on late."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from qat import kernels
from qat.checkpoint import FORMATS
from qat.conversion import check_input
from qat.data import ImageData
from qat.errors import UsageError
from qat.lit.parallel import SHARDED
from qat.nn.execution import MEMORY
from qat.spec import check_bits, check_choice, check_int
from qat.tasks.cli import PATHS
from qat.tasks.trainer_checks import check_trainer

FLAGS = (
    "overwrite",
    "allow_changed_data",
    "ckpt_optimizer",
    "compile",
    "model.pretrained",
    "model.reset_head",
    "model.grad_checkpointing",
    "teacher.pretrained",
    "report",
)
HIGHEST_SEED = 2**32 - 1  # numpy's
VAL_METRICS = ("val/top1", "val/top5", "val/loss")
GROUPS = (
    "model",
    "model.args",
    "data",
    "trainer",
    "quant",
    "ptq",
    "loss",
    "optimizer",
    "scheduler",
    "teacher",
    "checkpoint",
    "loss.terms",
    "loss.regularizers",
    "format",
)
INITS = ("full", "reference")
OPTIONAL_GROUPS = ("callbacks", "logger", "search", "analysis")
MISSING = object()
COMMANDS = ("train", "eval", "ptq", "analyze", "export")
KEYS = {
    "model": ("name", "pretrained", "weights", "reset_head", "imports", "init", "grad_checkpointing", "args"),
    "teacher": ("model", "ckpt", "pretrained"),
    "checkpoint": ("every_n_steps",),
}


def check_settings(cfg: DictConfig) -> None:
    """Raise `UsageError` on the first of the settings of a command that cannot work; from here on the kernels are those it names."""
    _check_groups(cfg)
    check_choice("command", cfg.command, COMMANDS)
    check_int("seed", cfg.seed, 0)
    if cfg.seed > HIGHEST_SEED:
        raise UsageError(f"seed={cfg.seed}: must be an integer from 0 to {HIGHEST_SEED}")
    check_choice("memory", OmegaConf.select(cfg, "memory", default=MEMORY[0]), MEMORY)
    kernels.use(OmegaConf.select(cfg, "kernels", default=kernels.CHOICES[0]))
    for name in FLAGS:
        check_flag(name, OmegaConf.select(cfg, name, default=False))
    for name in PATHS:
        check_path(name, OmegaConf.select(cfg, name))
    _check_keys_of_groups(cfg)
    _check_file_settings(cfg)
    if cfg.command != "export":
        check_trainer(cfg.trainer)


def _check_groups(cfg: DictConfig) -> None:
    for name in GROUPS + OPTIONAL_GROUPS:
        value = OmegaConf.select(cfg, name, default=MISSING)
        if value is not MISSING and not OmegaConf.is_dict(value) and not (value is None and name in OPTIONAL_GROUPS):
            raise UsageError(f"{name}={value!r}: must be a group of settings")


def _check_keys_of_groups(cfg: DictConfig) -> None:
    """Settings that no command reads would be passed over in silence: `model.pretrainde=true`."""
    for group, keys in KEYS.items():
        settings = OmegaConf.select(cfg, group) or {}
        text = OmegaConf.to_yaml(settings)
        for key in settings:
            if key not in keys and f"{group}.{key}}}" not in text:  # others of the group may be made of it
                raise UsageError(f"{group}.{key} is none of them: the settings are {', '.join(keys)}")


def _check_file_settings(cfg: DictConfig) -> None:
    """What is read only beside a file, and would be passed over without one."""
    check_choice("ckpt_format", OmegaConf.select(cfg, "ckpt_format", default="auto"), FORMATS)
    for name in ("ckpt_bits", "ckpt_act_bits"):
        bits = OmegaConf.select(cfg, name)
        if bits is not None:
            check_bits(name, bits)
            if not OmegaConf.select(cfg, "ckpt"):
                raise UsageError(f"{name}={bits!r}: only for files of the paper's code (ckpt_format=ofq); set ckpt=FILE")
    check_choice("model.init", OmegaConf.select(cfg, "model.init", default=INITS[0]), INITS)
    for name in ("model.name", "teacher.model"):
        value = OmegaConf.select(cfg, name)
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{name}={value!r}: must be the name of a timm model")


def check_flag(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is true or false: any other text, `no` too, would count as true."""
    if not isinstance(value, bool):
        raise UsageError(f"{setting}={value!r}: must be true or false")


def check_path(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a text that can be a path, or None: an empty one is a variable of a shell that is not set."""
    if value is not None and not (isinstance(value, str) and value and "\0" not in value):
        raise UsageError(f"{setting}={value!r}: must be a path{'' if value else '; null = none'}")
    try:
        Path(value or ".").exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UsageError(f"{setting}={value!r}: cannot be looked at ({error.strerror})") from error


def check_keys(setting: str, settings: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raise `UsageError` unless the keys of a group are `keys`."""
    for key in sorted(settings.keys() ^ set(keys)):
        problem = "is missing" if key in keys else "is none of them"
        raise UsageError(f"{setting}.{key} {problem}: the settings are {', '.join(keys)}")


def check_callback(name: str, callback: object) -> None:
    """Raise `UsageError` unless it is a callback, and what it monitors may exist: Lightning says so after an epoch of training."""
    if not isinstance(callback, Callback):
        raise UsageError(f"callbacks.{name}: {type(callback).__name__} is not a subclass of lightning.pytorch.Callback")
    monitor = getattr(callback, "monitor", None)
    if isinstance(monitor, str) and (monitor.startswith("val") or "/" not in monitor) and monitor not in VAL_METRICS:
        raise UsageError(f"callbacks.{name}.monitor={monitor!r}: must be one of those of the validation: {', '.join(VAL_METRICS)}")


def check_averaging(name: str, settings: Mapping[str, Any], callback: object) -> None:
    """Raise `UsageError` for a setting of averaged weights that torch would refuse at the first step."""
    if not isinstance(callback, WeightAveraging):
        return
    known = {*inspect.signature(type(callback)).parameters, *inspect.signature(AveragedModel).parameters}
    for key in settings:
        if key not in known and not str(key).startswith("_"):
            raise UsageError(f"callbacks.{name}.{key} is none of them: the settings are {', '.join(sorted(known))}")


def check_classifier(net: nn.Module, data: ImageData) -> None:
    """Raise `UsageError` unless images of the data pass through the net, and it gives a number for each class."""
    shape = check_input(net, data.input_size)
    if shape is not None and len(shape) != 2:
        sizes = f"(1, {', '.join(map(str, shape[1:]))})"
        raise UsageError(f"model.args.global_pool: the net gives {sizes} for an image; a classifier gives (1, classes)")


def check_sharding(cfg: DictConfig, name: str, part: object) -> None:
    """Raise `UsageError` if a callback or a term of the loss looks at whole weights, where each process has a part of them."""
    if cfg.trainer.get("strategy") == SHARDED and (getattr(part, "needs_whole_weights", False) or isinstance(part, WeightAveraging)):
        raise UsageError(f"trainer.strategy={SHARDED!r}: {name} needs whole weights; must be ddp")


def check_patches(net: nn.Module, data: ImageData) -> None:
    """Raise `UsageError` if the images are no whole number of patches: timm would leave out the pixels at the edge."""
    embedding = getattr(net, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return
    size = data.settings.image_size
    if any(size % side for side in patch):
        raise UsageError(f"data.image_size={size}: no multiple of the model's patch size {patch[0]} (data.patch_size)")
