"""What fits a net: optimizer, schedule, callbacks, loggers and Lightning's trainer, from a config; nets compiled or in less memory."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm.scheduler.scheduler
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat.callbacks import CGA, GraphSteps, LastCheckpoint, Preemption, StepLimit, StepSeed
from qat.errors import UsageError
from qat.launch.ranks import local_count
from qat.launch.slurm import environments
from qat.lit import Teacher
from qat.lit.compiled import compile_in_place
from qat.lit.loggers import CSVLog, disable_telemetry
from qat.lit.optim import build_optimizer, cosine_schedule, scaled_lr
from qat.lit.strategies import SHARDED, AtomicCheckpointIO, SyncBatchNorms, strategy_of
from qat.nn.attention import set_execution
from qat.tasks.build import instantiate, plain
from qat.tasks.checks import check_callback, check_sharding
from qat.utils.validate import check_int, check_number, unknown

log = logging.getLogger(__name__)


def build_optimizer_factory(cfg: DictConfig, trainer: Trainer) -> Any:
    """A function from a net to its optimizer; tried on one parameter, so that a mistake shows before anything is trained."""
    settings = plain(cfg.optimizer)
    check_number("optimizer.lr", settings["lr"], 0, above=True)
    settings["lr"] = scaled_lr(
        settings["lr"],
        global_batch=global_batch(cfg, trainer),
        lr_base_batch=settings.pop("lr_base_batch", None),
    )
    if cfg.scheduler.min_lr > settings["lr"]:
        log.warning(
            "scheduler.min_lr=%r: is above the learning rate %.4g (optimizer.lr)",
            cfg.scheduler.min_lr,
            settings["lr"],
        )
    build_optimizer(nn.Linear(1, 1), **settings | {"layer_decay": None})
    return partial(build_optimizer, **settings)


def global_batch(cfg: DictConfig, trainer: Trainer) -> int:
    """Images per optimizer step: batch size x processes x accumulated batches."""
    check_int("data.batch_size", cfg.data.batch_size, 1)
    return int(cfg.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches)


def build_scheduler_factory(cfg: DictConfig) -> Any:
    """A function from (optimizer, epochs, steps per epoch) to (schedule, interval)."""
    settings = plain(cfg.scheduler)
    warmup_epochs, cooldown_epochs = settings.pop("warmup_epochs"), settings.pop("cooldown_epochs")
    check_number("scheduler.warmup_epochs", warmup_epochs, 0, below=cfg.trainer.max_epochs)
    check_number(
        "scheduler.cooldown_epochs",
        cooldown_epochs,
        0,
        below=cfg.trainer.max_epochs - warmup_epochs,
    )
    for name, epochs in (("warmup", warmup_epochs), ("cooldown", cooldown_epochs)):
        if settings["interval"] == "epoch" and epochs % 1:
            raise UsageError(
                f"scheduler.{name}_epochs={epochs}: must be an integer with scheduler.interval=epoch; step takes fractions"
            )
    if cfg.trainer.fast_dev_run:
        warmup_epochs = cooldown_epochs = 0

    def make(
        optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ) -> tuple[timm.scheduler.scheduler.Scheduler, str]:
        unit = 1 if settings["interval"] == "epoch" else steps
        periods, warmup = int((epochs - cooldown_epochs) * unit), int(warmup_epochs * unit)
        return cosine_schedule(optimizer, periods=periods, warmup=warmup, **settings), settings[
            "interval"
        ]

    return make


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """The callbacks of `cfg.callbacks`; checkpoints go to `checkpoints/` in the run directory."""
    callbacks: list[Callback] = []
    for name, callback_cfg in (cfg.callbacks or {}).items():
        if callback_cfg is None:  # switched off: callbacks.best=null
            continue
        callback = instantiate(callback_cfg, f"callbacks.{name}")
        check_callback(name, callback)
        check_sharding(cfg, f"callbacks.{name}", callback)
        if isinstance(callback, ModelCheckpoint | LastCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(Path(cfg.run_dir) / "checkpoints")
        if not isinstance(callback, ProgressBar) or sys.stdout.isatty():
            callbacks.append(callback)
    averages = any(isinstance(one, WeightAveraging) for one in callbacks)
    if averages and not any(isinstance(one, Checkpointing) for one in callbacks):
        raise UsageError(
            "callbacks: none of them saves the averaged weights; must be callbacks=[default,ema]"
        )
    if averages and any(getattr(one, "save_weights_only", False) for one in callbacks):
        raise UsageError(
            "callbacks: save_weights_only=true writes the weights in training, not their average; must be false with an average"
        )
    if compiles(cfg) == "graphs":
        callbacks.append(GraphSteps())
    # Annealing sets the learning rate and takes weights back before others log or average them. `last.ckpt` has the state of all others,
    # and preemption ends the run after it.
    callbacks.sort(
        key=lambda one: isinstance(one, LastCheckpoint | Preemption) - isinstance(one, CGA)
    )
    return [StepSeed(cfg.seed), *callbacks]


def build_loggers(cfg: DictConfig, *, resumed_at: int = 0) -> list[Logger]:
    """The loggers of `cfg.logger`; `metrics.csv` of a run that is resumed at a step keeps the rows before it."""
    disable_telemetry()
    loggers = [
        instantiate(one, f"logger.{name}")
        for name, one in (cfg.logger or {}).items()
        if one is not None
    ]
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise UsageError(
                f"logger: {type(logger).__name__} is not a subclass of lightning.pytorch.loggers.Logger"
            )
        if isinstance(logger, CSVLog):
            logger.resumed_at = resumed_at
    return loggers


def build_trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Lightning's trainer on `cfg.trainer`.

    Raises:
        UsageError: Lightning does not take one of the settings, or the accelerator is not there.
    """
    settings: dict[str, Any] = {
        key: instantiate(value, f"trainer.{key}")
        if OmegaConf.is_dict(value) and "_target_" in value
        else plain(value)
        for key, value in cfg.trainer.items()
    }
    # Sharded, what is gathered for a validation is trained with afterwards; compiled, a test would need a graph beside the validation's.
    if settings.get("strategy") == SHARDED or compiles(cfg):
        settings["inference_mode"] = False
    settings["strategy"] = strategy_of(
        settings.get("strategy", "auto"), local_count(settings) * settings.get("num_nodes", 1)
    )
    if settings.get("max_steps", -1) > 0:
        callbacks = [StepLimit(settings.pop("max_steps")), *callbacks]
    callbacks = [one for one in callbacks if loggers or not isinstance(one, LearningRateMonitor)]
    own: dict[str, Any] = {
        "callbacks": callbacks,
        "logger": loggers or False,
        "plugins": [
            AtomicCheckpointIO(),
            *environments(),
            *([SyncBatchNorms()] if settings.get("sync_batchnorm") else []),
        ],
        "default_root_dir": cfg.run_dir,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(
            isinstance(one, Checkpointing) for one in callbacks
        ),  # else Lightning adds one of its own
        "enable_progress_bar": any(isinstance(one, ProgressBar) for one in callbacks),
    }
    known = inspect.signature(Trainer).parameters
    for name, value in settings.items():
        if name in own:
            raise UsageError(
                f"trainer.{name}={value!r}: must be left out; qat sets it (callbacks, logger, run_dir)"
            )
        if name not in known:
            raise UsageError(unknown(f"trainer.{name}={value!r}", name, known))
    try:
        trainer = Trainer(**settings, **own)
    except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        message = " ".join(str(error).split())
        # The settings whose name or text the message has, else those of where a net runs.
        named = [
            name
            for name, value in settings.items()
            if re.search(rf"(?<![A-Za-z]){name}\b", message) or f"'{value}'" in message
        ]
        named = named or ["accelerator", "devices", "strategy"]
        raise UsageError(
            f"{', '.join(f'trainer.{name}={cfg.trainer.get(name)!r}' for name in named)}: {message}"
        ) from error
    if settings.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UsageError(
            "trainer.sync_batchnorm=true: torch does not synchronize batch norms on CPUs; must be false"
        )
    return trainer


def use_less_memory(cfg: DictConfig, net: nn.Module) -> None:
    """Under `memory=recompute` keep no probabilities, under `model.grad_checkpointing=true` only what enters each block.

    Raises:
        UsageError: the model cannot do the latter.
    """
    set_execution(net, memory=cfg.memory)
    if not cfg.model.grad_checkpointing:
        return
    try:
        net.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    except (AttributeError, TypeError, AssertionError) as error:
        raise UsageError(
            f"model.grad_checkpointing=true: {cfg.model.name} does not support it; must be false"
        ) from error


def compiles(cfg: DictConfig) -> bool | str:
    """Whether `compile` asks for compiled nets, or for `graphs` of them; `auto` does on CUDA, unless the processes share the weights.

    Raises:
        UsageError: `compile` is not true, false, auto or graphs, or asks for graphs without CUDA.
    """
    asked = cfg.get("compile", False)
    if asked not in {True, False, "auto", "graphs"}:
        raise UsageError(f"compile={asked!r}: must be one of true, false, auto, graphs")
    on_cuda = torch.cuda.is_available() and str(cfg.trainer.get("accelerator", "auto")) in {
        "auto",
        "gpu",
        "cuda",
    }
    if asked == "graphs" and not on_cuda:
        raise UsageError(
            f"compile=graphs: CUDA graphs need CUDA, trainer.accelerator={cfg.trainer.get('accelerator')!r} has none; "
            "must be one of true, false, auto"
        )
    if asked == "auto":
        return (
            on_cuda and cfg.trainer.get("strategy") != SHARDED
        )  # and "graphs", once a GPU has shown them right
    return asked


def compile_nets(cfg: DictConfig, net: nn.Module, teacher: Teacher | None) -> None:
    """Compile student and teacher in place, each as one graph, where `compiles` says so; names in state dicts stay what they are.

    One operation is compiled first: where torch cannot, `auto` leaves nets eager.

    Raises:
        UsageError: torch cannot compile here, and `compile` is not auto.
    """
    way = compiles(cfg)
    if not way:
        return
    device = next(net.parameters()).device
    try:
        torch.compile(torch.square)(torch.zeros(2, device=device))
    except Exception as error:
        why = f"torch cannot compile for {device.type} here ({str(error).strip().partition(chr(10))[0]})"
        if cfg.compile != "auto":
            raise UsageError(f"compile={str(cfg.compile).lower()}: {why}; must be false") from error
        log.warning("compile=auto: the model is not compiled: %s", why)
        return
    torch.compiler.reset()  # nets of a sweep's earlier jobs count towards the limit of graphs
    compile_in_place(net, recompute=cfg.memory == "recompute", graphs=way == "graphs")
    if teacher is not None:
        teacher.compile(graphs=way == "graphs")
