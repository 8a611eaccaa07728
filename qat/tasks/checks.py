"""Settings that Lightning or Python would take and then train on nothing, or fail on late."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
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
from qat.lit.module import limited
from qat.lit.parallel import SHARDED
from qat.nn.execution import MEMORY
from qat.spec import HIGHEST_WHOLE, check_bits, check_choice, check_number, check_whole
from qat.tasks.cli import PATHS
from qat.tasks.ranks import HIGHEST_COUNT

FLAGS = (
    "overwrite",
    "ckpt_optimizer",
    "compile",
    "model.pretrained",
    "model.reset_head",
    "model.grad_checkpointing",
    "teacher.pretrained",
    "report",
)
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "32", "16", "bf16", "64")
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
SPLITS = ("train", "val", "test")
KEYS = {
    "model": ("name", "pretrained", "weights", "reset_head", "imports", "init", "grad_checkpointing", "args"),
    "teacher": ("model", "ckpt", "pretrained"),
    "checkpoint": ("every_n_steps",),
}


def check_settings(cfg: DictConfig) -> None:
    """Raise `UsageError` on the first of the settings of a command that cannot work; from here on the kernels are those it names."""
    _check_groups(cfg)
    check_choice("command", cfg.command, COMMANDS)
    check_whole("seed", cfg.seed, 0)
    if cfg.seed > HIGHEST_SEED:
        raise UsageError(f"seed={cfg.seed}: allowed are whole numbers from 0 to {HIGHEST_SEED}")
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
            raise UsageError(f"{name}={value!r}: allowed is a group of settings")


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
            raise UsageError(f"{name}={value!r}: allowed is the name of a timm model")


def check_flag(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is true or false: any other text, `no` too, would count as true."""
    if not isinstance(value, bool):
        raise UsageError(f"{setting}={value!r}: allowed are true and false")


def check_path(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a text that can be a path, or None: an empty one is a variable of a shell that is not set."""
    if value is not None and not (isinstance(value, str) and value and "\0" not in value):
        raise UsageError(f"{setting}={value!r}: allowed is a path{'' if value else '; null = none'}")
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
        raise UsageError(f"callbacks.{name}.monitor={monitor!r}: allowed of the validation are {', '.join(VAL_METRICS)}")


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
        raise UsageError(f"trainer.strategy={SHARDED!r}: {name} needs whole weights; allowed is ddp")


def check_patches(net: nn.Module, data: ImageData) -> None:
    """Raise `UsageError` if the images are no whole number of patches: timm would leave out the pixels at the edge."""
    embedding = getattr(net, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return
    size = data.settings.image_size
    if any(size % side for side in patch):
        raise UsageError(f"data.image_size={size}: no multiple of the model's patch size {patch[0]} (data.patch_size)")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` on the first of Lightning's settings with a value that cannot work; those that are absent are left to it."""
    for name, check in _CHECKS.items():
        if name in settings:
            check(f"trainer.{name}", settings[name])
    every, epochs = settings.get("check_val_every_n_epoch"), settings.get("max_epochs")
    if every is not None and epochs is not None and every > epochs:
        setting = f"trainer.check_val_every_n_epoch={every}"
        raise UsageError(f"{setting}: none of the {epochs} epochs would be validated; allowed are whole numbers from 1 to {epochs}")


def _whole_from(lowest: int) -> Callable[[str, object], None]:
    return lambda setting, value: check_whole(setting, value, lowest)


def _check_limit(setting: str, value: object) -> None:
    """A count of batches or a share of them: 2.0 is neither, and 0 would train or test on nothing."""
    is_count = isinstance(value, int) and HIGHEST_WHOLE >= value >= (0 if "val" in setting else 1)
    is_share = isinstance(value, float) and 0 < value <= 1
    if isinstance(value, bool) or not (value is None or is_count or is_share):
        lowest = "0 (off)" if "val" in setting else "1"
        raise UsageError(f"{setting}={value!r}: allowed are whole numbers from {lowest}, and shares of all batches above 0 to 1.0")


def _check_fast_dev_run(setting: str, value: object) -> None:
    if value is not None and not isinstance(value, bool) and not (isinstance(value, int) and 0 <= value <= HIGHEST_WHOLE):
        raise UsageError(f"{setting}={value!r}: allowed are true, false and a number of batches")


def _check_clip(setting: str, value: object) -> None:
    if value is not None:
        check_number(setting, value, 0)


def _check_every(setting: str, value: object) -> None:
    if value is not None:
        check_whole(setting, value, 1)


def _check_steps(setting: str, value: object) -> None:
    if value not in {None, -1}:
        check_whole(setting, value, 1)


def _check_interval(setting: str, value: object) -> None:
    """A share of an epoch, or a number of batches; Lightning compares the latter with those that there are."""
    is_share = isinstance(value, float) and 0 < value <= 1
    if value is not None and not is_share and (isinstance(value, bool | float) or not (isinstance(value, int) and value >= 1)):
        raise UsageError(f"{setting}={value!r}: allowed are whole numbers of batches from 1, and shares of an epoch above 0 to 1.0")


def _check_precision(setting: str, value: object) -> None:
    if str(value) not in PRECISIONS:
        raise UsageError(f"{setting}={value!r}: allowed are {', '.join(PRECISIONS)}")


def _check_devices(setting: str, value: object) -> None:
    if isinstance(value, bool) or (isinstance(value, int) and value > HIGHEST_COUNT):
        raise UsageError(f"{setting}={value!r}: allowed are a number of devices up to {HIGHEST_COUNT}, auto, and a list of indices")


def _check_strategy(setting: str, value: object) -> None:
    if isinstance(value, list | Mapping):
        raise UsageError(f"{setting}={value!r}: allowed is the name of one of Lightning's strategies")
    if str(value).startswith(("fsdp_", "deepspeed", "model_parallel")):
        raise UsageError(f"{setting}={value!r}: allowed are auto, ddp, fsdp")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_epochs": _whole_from(1),
    "accumulate_grad_batches": _whole_from(1),
    "gradient_clip_val": _check_clip,
    "precision": _check_precision,
    "devices": _check_devices,
    "strategy": _check_strategy,
    "fast_dev_run": _check_fast_dev_run,
    "num_nodes": _whole_from(1),
    "max_steps": _check_steps,
    "val_check_interval": _check_interval,
    "check_val_every_n_epoch": _check_every,
    "log_every_n_steps": _whole_from(0),
    "num_sanity_val_steps": _whole_from(-1),
    **{f"limit_{split}_batches": _check_limit for split in SPLITS},
}


def check_batches(settings: Mapping[str, Any], data: ImageData, world_size: int) -> None:
    """Raise `UsageError` if there are fewer batches than the trainer's settings ask for."""
    _check_shares(settings, data)
    _check_interval_within(settings, data, world_size)


def _check_shares(settings: Mapping[str, Any], data: ImageData) -> None:
    """Raise `UsageError` if a share of a split is less than one batch: nothing would be done, or Lightning stops in the middle."""
    for split in SPLITS:
        name = data.evaluation_split if split == "test" else split
        share = settings.get(f"limit_{split}_batches")
        batches = math.ceil(len(data.split(name)) / data.settings.batch_size)
        if isinstance(share, float) and int(batches * share) < 1:
            lowest = math.ceil(1000 / batches) / 1000
            raise UsageError(
                f"trainer.limit_{split}_batches={share!r}: less than one of {batches} batches; allowed are shares from {lowest:g}"
            )


def _check_interval_within(settings: Mapping[str, Any], data: ImageData, world_size: int) -> None:
    """Raise `UsageError` if an epoch has fewer batches for a process than are to lie between two validations."""
    every = settings.get("val_check_interval")
    if not isinstance(every, int) or settings.get("check_val_every_n_epoch", 1) is None:
        return
    batches = limited(max(len(data.split("train")) // world_size // data.settings.batch_size, 1), settings.get("limit_train_batches"))
    if every > batches:
        allowed = f"allowed are whole numbers up to {batches}; any with +trainer.check_val_every_n_epoch=null"
        raise UsageError(f"trainer.val_check_interval={every}: an epoch has {batches} batches; {allowed}")
