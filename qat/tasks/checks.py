"""Settings that Lightning or Python would take and then train on nothing, or fail on late."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat.data import ImageData
from qat.errors import UsageError
from qat.spec import check_number, check_whole
from qat.tasks.cli import PATHS

FLAGS = ("overwrite", "ckpt_optimizer", "compile", "model.pretrained", "model.reset_head", "teacher.pretrained", "report")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "32", "16", "bf16", "64")
HIGHEST_SEED = 2**32 - 1  # numpy's
VAL_METRICS = ("val/top1", "val/top5", "val/loss")
SPLITS = ("train", "val", "test")


def check_settings(cfg: DictConfig) -> None:
    """Raise `UsageError` on the first of the settings of a command that cannot work."""
    check_whole("seed", cfg.seed, 0)
    if cfg.seed > HIGHEST_SEED:
        raise UsageError(f"seed={cfg.seed}: allowed are whole numbers from 0 to {HIGHEST_SEED}")
    for name in FLAGS:
        check_flag(name, OmegaConf.select(cfg, name, default=False))
    for name in PATHS:
        check_path(name, OmegaConf.select(cfg, name))
    check_trainer(cfg.trainer)


def check_flag(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is true or false: any other text, `no` too, would count as true."""
    if not isinstance(value, bool):
        raise UsageError(f"{setting}={value!r}: allowed are true and false")


def check_path(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is text or None."""
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{setting}={value!r}: allowed is a path")


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
    if isinstance(monitor, str) and monitor.startswith("val") and monitor not in VAL_METRICS:
        raise UsageError(f"callbacks.{name}.monitor={monitor!r}: allowed of the validation are {', '.join(VAL_METRICS)}")


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


def _whole_from(lowest: int) -> Callable[[str, object], None]:
    return lambda setting, value: check_whole(setting, value, lowest)


def _check_limit(setting: str, value: object) -> None:
    """A count of batches or a share of them: 2.0 is neither, and 0 would train or test on nothing."""
    is_count = isinstance(value, int) and value >= (0 if "val" in setting else 1)
    is_share = isinstance(value, float) and 0 < value <= 1
    if isinstance(value, bool) or not (value is None or is_count or is_share):
        lowest = "0 (off)" if "val" in setting else "1"
        raise UsageError(f"{setting}={value!r}: allowed are whole numbers from {lowest}, and shares of all batches above 0 to 1.0")


def _check_fast_dev_run(setting: str, value: object) -> None:
    if value is not None and not isinstance(value, bool) and not (isinstance(value, int) and value >= 0):
        raise UsageError(f"{setting}={value!r}: allowed are true, false and a number of batches")


def _check_clip(setting: str, value: object) -> None:
    if value is not None:
        check_number(setting, value, 0)


def _check_precision(setting: str, value: object) -> None:
    if str(value) not in PRECISIONS:
        raise UsageError(f"{setting}={value!r}: allowed are {', '.join(PRECISIONS)}")


def _check_devices(setting: str, value: object) -> None:
    if isinstance(value, bool):
        raise UsageError(f"{setting}={value!r}: allowed are a number of devices, auto, and a list of indices")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_epochs": _whole_from(1),
    "accumulate_grad_batches": _whole_from(1),
    "gradient_clip_val": _check_clip,
    "precision": _check_precision,
    "devices": _check_devices,
    "fast_dev_run": _check_fast_dev_run,
    "log_every_n_steps": _whole_from(0),
    "num_sanity_val_steps": _whole_from(-1),
    **{f"limit_{split}_batches": _check_limit for split in SPLITS},
}


def check_shares(settings: Mapping[str, Any], data: ImageData, splits: tuple[str, ...] = SPLITS) -> None:
    """Raise `UsageError` if a share of a split is less than one batch: nothing would be done, or Lightning stops in the middle."""
    for split in splits:
        name = data.evaluation_split if split == "test" else split
        share = settings.get(f"limit_{split}_batches")
        batches = math.ceil(len(data.split(name)) / data.settings.batch_size)
        if isinstance(share, float) and int(batches * share) < 1:
            lowest = math.ceil(1000 / batches) / 1000
            raise UsageError(
                f"trainer.limit_{split}_batches={share!r}: less than one of {batches} batches; allowed are shares from {lowest:g}"
            )
