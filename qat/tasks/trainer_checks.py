"""Settings of the trainer that Lightning would take and then train or test on nothing, or fail on late."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from qat.data import ImageData
from qat.errors import UsageError
from qat.lit.module import limited
from qat.spec import HIGHEST_WHOLE, check_int, check_number
from qat.tasks.ranks import HIGHEST_COUNT

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "32", "16", "bf16", "64")
SPLITS = ("train", "val", "test")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` on the first of Lightning's settings with a value that cannot work; those that are absent are left to it."""
    for name, check in _CHECKS.items():
        if name in settings:
            check(f"trainer.{name}", settings[name])
    every, epochs = settings.get("check_val_every_n_epoch"), settings.get("max_epochs")
    if every is not None and epochs is not None and every > epochs:
        setting = f"trainer.check_val_every_n_epoch={every}"
        raise UsageError(f"{setting}: none of the {epochs} epochs would be validated; must be an integer from 1 to {epochs}")


def _whole_from(lowest: int) -> Callable[[str, object], None]:
    return lambda setting, value: check_int(setting, value, lowest)


def _check_limit(setting: str, value: object) -> None:
    """A count of batches or a share of them: 2.0 is neither, and 0 would train or test on nothing."""
    is_count = isinstance(value, int) and HIGHEST_WHOLE >= value >= (0 if "val" in setting else 1)
    is_share = isinstance(value, float) and 0 < value <= 1
    if isinstance(value, bool) or not (value is None or is_count or is_share):
        lowest = "0 (off)" if "val" in setting else "1"
        raise UsageError(f"{setting}={value!r}: must be an integer of at least {lowest}, or a share of all batches above 0 to 1.0")


def _check_fast_dev_run(setting: str, value: object) -> None:
    if value is not None and not isinstance(value, bool) and not (isinstance(value, int) and 0 <= value <= HIGHEST_WHOLE):
        raise UsageError(f"{setting}={value!r}: must be true, false or a number of batches")


def _check_clip(setting: str, value: object) -> None:
    if value is not None:
        check_number(setting, value, 0)


def _check_every(setting: str, value: object) -> None:
    if value is not None:
        check_int(setting, value, 1)


def _check_steps(setting: str, value: object) -> None:
    if value is not None and value != -1:
        check_int(setting, value, 1)


def _check_interval(setting: str, value: object) -> None:
    """A share of an epoch, or a number of batches; Lightning compares the latter with those that there are."""
    is_share = isinstance(value, float) and 0 < value <= 1
    if value is not None and not is_share and (isinstance(value, bool | float) or not (isinstance(value, int) and value >= 1)):
        raise UsageError(f"{setting}={value!r}: must be an integer of at least 1 (batches), or a share of an epoch above 0 to 1.0")


def _check_precision(setting: str, value: object) -> None:
    if str(value) not in PRECISIONS:
        raise UsageError(f"{setting}={value!r}: must be one of {', '.join(PRECISIONS)}")


def _check_devices(setting: str, value: object) -> None:
    if isinstance(value, bool) or (isinstance(value, int) and value > HIGHEST_COUNT):
        raise UsageError(f"{setting}={value!r}: must be a number of devices up to {HIGHEST_COUNT}, auto, or a list of indices")


def _check_strategy(setting: str, value: object) -> None:
    if isinstance(value, list | Mapping):
        raise UsageError(f"{setting}={value!r}: must be the name of one of Lightning's strategies")
    if str(value).startswith(("fsdp_", "deepspeed", "model_parallel")):
        raise UsageError(f"{setting}={value!r}: must be one of auto, ddp, fsdp")


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
    """Raise `UsageError` if there are fewer batches than the trainer's settings ask for; a dry run asks for none of that."""
    if settings.get("fast_dev_run"):
        return
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
                f"trainer.limit_{split}_batches={share!r}: less than one of {batches} batches; must be a share of at least {lowest:g}"
            )


def _check_interval_within(settings: Mapping[str, Any], data: ImageData, world_size: int) -> None:
    """Raise `UsageError` if an epoch has fewer batches for a process than are to lie between two validations."""
    every = settings.get("val_check_interval")
    if not isinstance(every, int) or settings.get("check_val_every_n_epoch", 1) is None:
        return
    batches = limited(max(len(data.split("train")) // world_size // data.settings.batch_size, 1), settings.get("limit_train_batches"))
    if every > batches:
        allowed = f"must be an integer of at most {batches}; any with +trainer.check_val_every_n_epoch=null"
        raise UsageError(f"trainer.val_check_interval={every}: an epoch has {batches} batches; {allowed}")
