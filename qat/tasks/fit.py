"""What fits a net: optimizer, schedule, callbacks, loggers and Lightning's trainer, from a config."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm.scheduler.scheduler
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat.callbacks import CGA, CompileWatch, FaultGuard, LastCheckpoint, Preemption, StepLimit, StepSeed, Stopwatch
from qat.errors import UsageError
from qat.launch.ranks import local_count
from qat.launch.slurm import environments
from qat.lit.checkpoint_io import AtomicCheckpointIO
from qat.lit.csv_log import CSVLog
from qat.lit.optim import build_optimizer, check_layer_decay, cosine_schedule, scaled_lr
from qat.lit.optimizer_state import with_optimizer_state
from qat.lit.parallel import SHARDED, strategy_of
from qat.model.start import Start
from qat.tasks.build import instantiate, plain
from qat.tasks.checks import check_callback, check_sharding
from qat.tasks.options import compiles
from qat.utils.validate import check_int, check_number

# All repeat what the first lines of a run say already; what ends a run early they do not. The root logger's handlers say it, once.
logging.getLogger("lightning").handlers.clear()
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.pytorch.callbacks.early_stopping").setLevel(logging.INFO)
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.INFO)
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: (
        record.levelno > logging.INFO or record.getMessage().strip().startswith(("Detected KeyboardInterrupt", "Time limit reached"))
    )
)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
logging.getLogger("timm").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own use of torch
warnings.filterwarnings("ignore", message=".*all_gather.*is deprecated")  # Lightning's own use of torch
warnings.filterwarnings("ignore", message=".*does not have many workers")  # small data are in memory
warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")  # Hydra made it
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # so it is when a run goes on
warnings.filterwarnings("ignore", message="You requested to overfit but enabled .* dataloader shuffling")  # which is what it turns off
warnings.filterwarnings("ignore", message="The `srun` command is available")  # a login node, or processes that are started here
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # timm's nets add to it out of place
warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than the logging interval")


def build_optimizer_factory(cfg: DictConfig, trainer: Trainer) -> Any:
    """A function from a net to its optimizer; tried on one parameter, so that a mistake shows before anything is trained."""
    settings = plain(cfg.optimizer)
    for name in ("opt", "lr", "weight_decay"):
        if name not in settings:
            raise UsageError(f"optimizer.{name} is missing")
    check_number("optimizer.lr", settings.get("lr"), 0, above=True)
    scaling = {name: settings.pop(name) for name in ("lr_base_batch", "lr_batch_rule") if name in settings}
    settings["lr"] = scaled_lr(settings["lr"], global_batch=global_batch(cfg, trainer), **scaling)
    check_layer_decay(settings.get("layer_decay"))
    build_optimizer(nn.Linear(1, 1), **settings | {"layer_decay": None})
    return partial(build_optimizer, **settings)


def take_optimizer_state(cfg: DictConfig, make: Any, start: Start) -> Any:
    """The optimizer factory, with the state of `ckpt`'s optimizer under `ckpt_optimizer=true`; the start says so.

    Raises:
        UsageError: `ckpt` has no such state.
    """
    if not cfg.ckpt_optimizer:
        return make
    if not cfg.ckpt:
        raise UsageError("ckpt_optimizer=true: there is no checkpoint to take it from; set ckpt=PATH")
    make_and_fill, note = with_optimizer_state(make, cfg.ckpt, start.net)
    start.notes.append(note)
    return make_and_fill


def global_batch(cfg: DictConfig, trainer: Trainer) -> int:
    """Images per optimizer step: batch size x processes x accumulated batches."""
    check_int("data.batch_size", cfg.data.batch_size, 1)
    return int(cfg.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches)


def build_scheduler_factory(cfg: DictConfig) -> Any:
    """A function from (optimizer, epochs, steps per epoch) to (schedule, interval)."""
    settings = plain(cfg.scheduler)
    warmup_epochs, cooldown_epochs = settings.pop("warmup_epochs"), settings.pop("cooldown_epochs")
    max_epochs = cfg.trainer.max_epochs if cfg.trainer.max_epochs > 0 else math.inf
    check_number("scheduler.warmup_epochs", warmup_epochs, 0, below=max_epochs)
    check_number("scheduler.cooldown_epochs", cooldown_epochs, 0, below=max_epochs - warmup_epochs)
    if cfg.trainer.fast_dev_run:
        warmup_epochs = cooldown_epochs = 0

    def make(optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> tuple[timm.scheduler.scheduler.Scheduler, str]:
        unit = 1 if settings["interval"] == "epoch" else steps
        periods, warmup = int((epochs - cooldown_epochs) * unit), int(warmup_epochs * unit)
        return cosine_schedule(optimizer, periods=periods, warmup=warmup, **settings), settings["interval"]

    return make


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """The callbacks of `cfg.callbacks`; checkpoints go to `checkpoints/` in the run directory."""
    callbacks: list[Callback] = [StepSeed(cfg.seed), Stopwatch(), *([CompileWatch()] if compiles(cfg) else [])]
    for name, callback_cfg in (cfg.get("callbacks") or {}).items():
        if callback_cfg is None:  # switched off: callbacks.best=null
            continue
        callback = instantiate(callback_cfg, f"callbacks.{name}")
        check_callback(name, callback)
        check_sharding(cfg, f"callbacks.{name}", callback)
        if isinstance(callback, ModelCheckpoint | LastCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(Path(cfg.run_dir) / "checkpoints")
        callbacks.append(callback)
    # Whoever logs the learning rate of a step looks behind the callback that sets it; whoever looks at the weights behind a step, as
    # averages do, looks behind the one that takes it back. `last.ckpt` has the state of all others, and preemption ends the run behind it.
    first, second, last = StepSeed | CGA, FaultGuard, LastCheckpoint | Preemption
    return sorted(callbacks, key=lambda one: (not isinstance(one, first), not isinstance(one, second), isinstance(one, last)))


def build_loggers(cfg: DictConfig, *, goes_on: bool = False) -> list[Logger]:
    """The loggers of `cfg.logger`; of a run that goes on, a CSV file keeps its rows."""
    loggers = [instantiate(one, f"logger.{name}") for name, one in (cfg.get("logger") or {}).items() if one is not None]
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise UsageError(f"logger: {type(logger).__name__} is not a subclass of lightning.pytorch.loggers.Logger")
        if isinstance(logger, CSVLog):
            logger.goes_on = goes_on
    return loggers


def build_trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Lightning's trainer on `cfg.trainer`.

    Raises:
        UsageError: Lightning does not take one of the settings, or the accelerator is not there.
    """
    settings: Mapping[str, Any] = {
        key: instantiate(value, f"trainer.{key}") if OmegaConf.is_dict(value) and "_target_" in value else plain(value)
        for key, value in cfg.trainer.items()
    }
    if settings.get("max_steps", -1) > 0:
        callbacks = [StepLimit(settings["max_steps"]), *callbacks]
        settings = {**settings, "max_steps": -1}
    # Sharded, what is gathered for a validation is trained with afterwards; compiled, a test would need a graph beside the validation's.
    if settings.get("strategy") == SHARDED or compiles(cfg):
        settings = {**settings, "inference_mode": False}
    strategy = strategy_of(settings.get("strategy", "auto"), local_count(settings) * settings.get("num_nodes", 1))
    monitors = [c for c in callbacks if loggers or type(c).__name__ not in {"LearningRateMonitor", "Throughput"}]
    try:
        return Trainer(
            **{**settings, "strategy": strategy},
            callbacks=monitors,
            logger=loggers or False,
            plugins=[AtomicCheckpointIO(), *environments()],
            default_root_dir=cfg.run_dir,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(c, Checkpointing) for c in monitors),  # else Lightning adds one of its own
            enable_progress_bar=any(isinstance(c, ProgressBar) for c in monitors),
        )
    except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        message = " ".join(str(error).split())
        raise UsageError(f"{_blamed(settings, message)}: {message}") from error


def _blamed(settings: Mapping[str, Any], message: str) -> str:
    """The settings that one of Lightning's complaints is about, with their values: those it names, else where a net runs."""
    named = [key for key in settings if re.search(rf"(?<![A-Za-z]){key}\b", message)]
    return ", ".join(f"trainer.{key}={settings.get(key)!r}" for key in named or ("accelerator", "devices", "strategy"))
