"""Settings that Lightning or Python would take and then train on nothing, or fail on late."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from torch.optim.swa_utils import AveragedModel

from qat import kernels
from qat.cli.schemas import SPLITS, conform
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch.ranks import is_first
from qat.lit.module import limited
from qat.lit.parallel import SHARDED
from qat.model import hub
from qat.model.checkpoint import classes_of
from qat.model.convert import check_input
from qat.model.start import check_model
from qat.utils.bounds import json_object
from qat.utils.signature import check_arguments
from qat.utils.validate import check_int, check_number

log = logging.getLogger(__name__)
# Of settings of the trainer: what Lightning takes below that trains on nothing, never ends, or fails in the middle.
LOWEST = {"accumulate_grad_batches": 1, "num_nodes": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 0}
# Averaged weights are copied in float32, before Lightning turns the net into these.
NOT_AVERAGED = ("64", "64-true", "bf16-true", "16-true")
VAL_METRICS = ("val/top1", "val/top5", "val/loss")


def check_settings(cfg: DictConfig) -> None:
    """Give the settings of a command their types; use the kernels that it names, and its seed.

    Raises:
        UsageError: an unknown setting, a value of another type, or one that cannot work.
    """
    conform(cfg)
    _settle_hub(cfg)
    kernels.use(cfg.get("kernels", kernels.CHOICES[0]))
    if cfg.command != "export":
        check_trainer(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)


def _settle_hub(cfg: DictConfig) -> None:
    """Write out what `model=hf-hub:user/name` stands for: the `ckpt` of a net of ours, or timm's architecture, arguments and weights.

    Raises:
        UsageError: it cannot be fetched, is no net of timm's, or `ckpt` is set as well.
    """
    name = OmegaConf.select(cfg, "model.name")
    if not isinstance(name, str) or not name.startswith(hub.PREFIX):
        return
    folder = hub.fetch(name.removeprefix(hub.PREFIX), f"model={name}")
    config, wanted, weights = json_object(folder / hub.CONFIG), bool(cfg.model.pretrained), str(folder / hub.WEIGHTS)
    cfg.model.pretrained = False
    if hub.is_ours(folder):
        if cfg.get("ckpt"):
            raise UsageError(f"ckpt and model={name} are set: a net starts from one of them")
        cfg.ckpt, cfg.model.name = weights, None
        return
    check_model(f"model={name}: architecture", config.get("architecture"))
    with open_dict(cfg):
        given = {key: value for key, value in cfg.model.args.items_ex(resolve=False) if value is not None}
        cfg.model.args = {**(config.get("model_args") or {}), **given}
    # A checkpoint takes the place of the hub's weights, as it does of others.
    cfg.model.name, cfg.model.weights = config["architecture"], weights if wanted and not cfg.get("ckpt") else None
    described = config.get("pretrained_cfg") or {}
    for key in ("mean", "std", "crop_pct", "interpolation"):
        if key in cfg.get("data", {}) and cfg.data[key] is None and isinstance(described, dict):
            cfg.data[key] = described.get(key)


def check_callback(name: str, callback: object) -> None:
    """Raise `UsageError` unless it is a callback, and what it monitors may exist: Lightning says so after an epoch of training."""
    if not isinstance(callback, Callback):
        raise UsageError(f"callbacks.{name}: {type(callback).__name__} is not a subclass of lightning.pytorch.Callback")
    monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
    if mode == "max" and "loss" in str(monitor):
        raise UsageError(f"callbacks.{name}.mode='max': the best {monitor} is the lowest; must be min")
    if isinstance(monitor, str) and (monitor.startswith("val") or "/" not in monitor) and monitor not in VAL_METRICS:
        raise UsageError(f"callbacks.{name}.monitor={monitor!r}: must be one of those of the validation: {', '.join(VAL_METRICS)}")


def check_averaging(name: str, settings: Mapping[str, Any], callback: object, precision: str) -> None:
    """Raise `UsageError` for a setting of averaged weights that torch would refuse at the first step."""
    if not isinstance(callback, WeightAveraging):
        return
    if precision in NOT_AVERAGED:
        raise UsageError(
            f"trainer.precision={precision!r}: callbacks.{name} averages float32; must be one of 32-true, bf16-mixed, 16-mixed"
        )
    known = {*inspect.signature(type(callback)).parameters, *inspect.signature(AveragedModel).parameters}
    for key in settings:
        if key not in known and not str(key).startswith("_"):
            raise UsageError(f"callbacks.{name}.{key}: must be one of {', '.join(sorted(known))}")


def check_classifier(net: nn.Module, data: ImageData) -> None:
    """Raise `UsageError` unless images of the data pass through the net, and it gives a number for each class."""
    if data.settings.num_classes < 2:
        raise UsageError(f"data.num_classes={data.settings.num_classes}: must be at least 2, or there is nothing to tell apart")
    shape = check_input(net, data.input_size)
    if shape is None:
        raise UsageError("model.args.features_only: the net gives several tensors for an image; a classifier gives one, (1, classes)")
    if len(shape) != 2:
        sizes = f"(1, {', '.join(map(str, shape[1:]))})"
        raise UsageError(f"model.args.global_pool: the net gives {sizes} for an image; a classifier gives (1, classes)")


def check_classes(net: nn.Module, data: ImageData, origin: str) -> None:
    """Raise `UsageError` if the data have the classes of a net in another order; warn if they call them otherwise."""
    had, has = classes_of(net), data.named_classes()
    if not had or not has or len(had) != len(has) or had == has:
        return
    number = next(n for n, (old, new) in enumerate(zip(had, has, strict=True)) if old != new)
    said = f"{origin}: its class {number} is {had[number]!r}, that of the data {has[number]!r}"
    if sorted(had) == sorted(has):
        raise UsageError(f"{said}: the same classes in another order; must be data with the order that it was trained on")
    if is_first():
        log.warning("%s: must be the same in other words", said)


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


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` on the first of Lightning's settings with a value that cannot work; those that are absent are left to it."""
    check_arguments("trainer", Trainer, settings, lowest=-1)
    check_int("trainer.max_epochs", settings.get("max_epochs"), 1)
    for name, lowest in LOWEST.items():
        if settings.get(name) is not None:
            check_int(f"trainer.{name}", settings[name], lowest)
    if settings.get("gradient_clip_val") is not None:
        check_number("trainer.gradient_clip_val", settings["gradient_clip_val"], 0)
    for name in ("max_steps", "limit_train_batches", "limit_test_batches"):
        if settings.get(name) == 0:
            raise UsageError(f"trainer.{name}={settings[name]!r}: must be above 0, or there is nothing to do")
    if str(settings.get("strategy")).startswith(("fsdp_", "deepspeed", "model_parallel")):
        raise UsageError(f"trainer.strategy={settings['strategy']!r}: must be one of auto, ddp, fsdp")
    every, epochs = settings.get("check_val_every_n_epoch"), settings.get("max_epochs")
    if every is not None and epochs is not None and every > epochs:
        setting = f"trainer.check_val_every_n_epoch={every}"
        raise UsageError(f"{setting}: none of the {epochs} epochs would be validated; must be an integer from 1 to {epochs}")


def check_batches(settings: Mapping[str, Any], data: ImageData, world_size: int) -> None:
    """Raise `UsageError` if there are fewer batches than the trainer's settings ask for; a dry run asks for none of that."""
    if settings.get("fast_dev_run"):
        return
    for split in SPLITS:
        _check_split(split, settings, data, world_size)
    _check_interval_within(settings, data, world_size)


def _check_split(split: str, settings: Mapping[str, Any], data: ImageData, world_size: int) -> None:
    """Raise `UsageError` if a process has no image or no batch of a split: Lightning would wait for it for ever, or stop in the middle."""
    images, share = _images(split, data), settings.get(f"limit_{split}_batches")
    if images < world_size:
        setting = f"trainer.devices={settings.get('devices')!r}"
        raise UsageError(f"{setting}: {world_size} processes for {images} images ({split}); must be at most {images} processes")
    if isinstance(share, float):
        batches = _batches(split, data, world_size)
        if int(batches * share) < 1:
            lowest = math.ceil(1000 / batches) / 1000
            raise UsageError(
                f"trainer.limit_{split}_batches={share!r}: less than one of {batches} batches; must be a share of at least {lowest:g}"
            )


def _images(split: str, data: ImageData) -> int:
    return len(data.split(data.evaluation_split if split == "test" else split))


def _batches(split: str, data: ImageData, world_size: int) -> int:
    """Batches of the process that has the fewest; in training the last, smaller one is left out."""
    images = _images(split, data) // world_size
    return max(images // data.settings.batch_size, 1) if split == "train" else math.ceil(images / data.settings.batch_size)


def _check_interval_within(settings: Mapping[str, Any], data: ImageData, world_size: int) -> None:
    """Raise `UsageError` if an epoch has fewer batches for a process than are to lie between two validations."""
    every = settings.get("val_check_interval")
    if not isinstance(every, int) or settings.get("check_val_every_n_epoch", 1) is None:
        return
    batches = limited(_batches("train", data, world_size), settings.get("limit_train_batches"))
    if every > batches:
        allowed = f"must be an integer of at most {batches}; any with trainer.check_val_every_n_epoch=null"
        raise UsageError(f"trainer.val_check_interval={every}: an epoch has {batches} batches; {allowed}")
