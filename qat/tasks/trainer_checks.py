"""Settings of the trainer that Lightning would take and then train or test on nothing, or fail on late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from qat.cli.schemas import SPLITS
from qat.data import ImageData
from qat.errors import UsageError
from qat.lit.module import limited
from qat.utils.signature import check_arguments
from qat.utils.validate import check_int, check_number

# What Lightning takes below that trains on nothing, never ends, or fails in the middle.
LOWEST = {"accumulate_grad_batches": 1, "num_nodes": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 0}


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
        allowed = f"must be an integer of at most {batches}; any with trainer.check_val_every_n_epoch=null"
        raise UsageError(f"trainer.val_check_interval={every}: an epoch has {batches} batches; {allowed}")
