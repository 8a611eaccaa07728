"""Build optimizer, schedule, callbacks, loggers and Lightning's trainer from a config.

The module also compiles models and makes models use less memory.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import (
    EarlyStopping,
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
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch.ranks import local_processes
from qat.launch.slurm import cluster_environments
from qat.lit import Teacher
from qat.lit.compiled import compile_in_place
from qat.lit.loggers import CSVLog, disable_telemetry
from qat.lit.optim import build_optimizer, check_phases, scaled_lr, scheduler_factory
from qat.lit.strategies import SHARDED, AtomicCheckpointIO, SyncBatchNorms, choose_strategy
from qat.nn.attention import set_execution
from qat.tasks.build import instantiate, to_plain
from qat.tasks.checks import VAL_METRICS, check_callback, check_sharding, check_writers
from qat.tasks.conf import display_name
from qat.utils.validate import check_int, check_number, unknown_message

log = logging.getLogger(__name__)


def build_optimizer_factory(cfg: DictConfig, trainer: Trainer) -> Any:
    """Return a function that builds the optimizer of a model.

    The function is tried on a small layer, so that mistakes raise `UsageError` before training.
    """
    settings = to_plain(cfg.optimizer)
    check_number("optimizer.lr", settings["lr"], 0, exclusive_lowest=True)
    settings["lr"] = scaled_lr(
        settings["lr"],
        global_batch=global_batch(cfg.data.batch_size, trainer),
        lr_base_batch=settings.pop("lr_base_batch", None),
    )
    if cfg.scheduler.min_lr > settings["lr"]:
        log.warning(
            "scheduler.min_lr=%r: is above the learning rate %.4g (optimizer.lr)",
            cfg.scheduler.min_lr,
            settings["lr"],
        )
    # `layer_decay` needs a whole model, whose layers can be numbered.
    build_optimizer(nn.Linear(1, 1), **settings | {"layer_decay": None})
    return partial(build_optimizer, **settings)


def global_batch(batch_size: int, trainer: Trainer) -> int:
    """Images per optimizer step: batch size x processes x accumulated batches."""
    check_int("data.batch_size", batch_size, 1)
    return int(batch_size * trainer.world_size * trainer.accumulate_grad_batches)


def build_scheduler_factory(cfg: DictConfig) -> Any:
    """Return a function that maps (optimizer, epochs, steps per epoch) to (schedule, interval).

    A dry run has no warm-up or cool-down.

    Raises:
        UsageError: warm-up or cool-down is invalid.
    """
    settings = to_plain(cfg.scheduler)
    check_phases(settings["warmup_epochs"], settings["cooldown_epochs"], cfg.trainer.max_epochs)
    factory = scheduler_factory(**settings)
    if cfg.trainer.fast_dev_run:
        return scheduler_factory(**settings | {"warmup_epochs": 0, "cooldown_epochs": 0})
    return factory


def batch_limit(cfg: DictConfig) -> int | float | None:
    """Number or fraction of the batches that an epoch takes; None = all."""
    if cfg.trainer.fast_dev_run:  # True is one batch
        return int(cfg.trainer.fast_dev_run)
    limit = cfg.trainer.get("overfit_batches") or cfg.trainer.limit_train_batches
    # The integer 1 is one batch.
    return None if limit == 1.0 and isinstance(limit, float) else limit


def steps_per_epoch(cfg: DictConfig, data: ImageData) -> int:
    """Number of optimizer steps of an epoch."""
    num_batches = len(data.train_dataloader())
    limit = batch_limit(cfg)
    if limit is not None:
        num_limited = limit if isinstance(limit, int) else limit * num_batches
        num_batches = min(num_batches, int(num_limited))
    return math.ceil(num_batches / cfg.trainer.accumulate_grad_batches)


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Build the callbacks of `cfg.callbacks` and those that qat adds.

    Progress bars are left out if stdout is not a terminal. Checkpoints go to `run_dir/checkpoints/`
    unless a callback has another folder.

    Raises:
        UsageError: a callback cannot be used.
    """
    callbacks: list[Callback] = []
    writers: dict[Path, str] = {}
    for name, callback_cfg in (cfg.callbacks or {}).items():
        if callback_cfg is None:  # callbacks.best=null
            continue
        callback = instantiate(callback_cfg, f"callbacks.{name}")
        check_callback(name, callback)
        check_sharding(cfg.trainer.get("strategy"), f"callbacks.{name}", callback)
        if isinstance(callback, ModelCheckpoint | LastCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(Path(cfg.run_dir) / "checkpoints")
        elif isinstance(callback, LastCheckpoint):
            raise UsageError(
                f"callbacks.{name}.dirpath={callback.dirpath!r}: must be null; "
                "a run resumes from the checkpoints in its run_dir"
            )
        check_writers(name, callback, writers)
        needs_val = isinstance(callback, EarlyStopping) and callback.monitor in VAL_METRICS
        if needs_val and cfg.trainer.get("limit_val_batches") == 0:
            raise UsageError(
                f"trainer.limit_val_batches=0: callbacks.{name} needs {callback.monitor}; "
                "must be above 0"
            )
        is_hidden = isinstance(callback, ProgressBar) and not sys.stdout.isatty()
        if not is_hidden:
            callbacks.append(callback)
    _check_weight_averaging(callbacks)
    if compile_mode(cfg) == "graphs":
        callbacks.append(GraphSteps())
    callbacks.sort(key=_callback_sort_key)
    return [StepSeed(cfg.seed), *callbacks]


def _check_weight_averaging(callbacks: list[Callback]) -> None:
    """Raise `UsageError` if weights are averaged, but the average would not be saved."""
    if not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        return
    if not any(isinstance(callback, Checkpointing) for callback in callbacks):
        raise UsageError(
            "callbacks: no callback saves the averaged weights; set callbacks=[default,ema]"
        )
    if any(getattr(callback, "save_weights_only", False) for callback in callbacks):
        raise UsageError(
            "callbacks: save_weights_only=true would save the training weights, not their average; "
            "must be false with ema"
        )


def _callback_sort_key(callback: Callback) -> int:
    """Sort key of a callback; callbacks with equal keys keep their order in the config.

    CGA comes first, so that it sets the learning rate before other callbacks log it.
    `LastCheckpoint`, which stores the state of all other callbacks, and `Preemption` come last.
    """
    if isinstance(callback, CGA):
        return 0
    if isinstance(callback, LastCheckpoint | Preemption):
        return 2
    return 1


def build_loggers(cfg: DictConfig, *, resume_step: int = 0) -> list[Logger]:
    """Build the loggers of `cfg.logger`.

    Args:
        cfg: config of a command.
        resume_step: step from which the run is resumed; earlier rows of `metrics.csv` are kept.

    Raises:
        UsageError: one of the loggers is not a Lightning logger.
    """
    disable_telemetry()
    loggers = []
    for name, logger_cfg in (cfg.logger or {}).items():
        if logger_cfg is not None:
            loggers.append(instantiate(logger_cfg, f"logger.{name}"))
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise UsageError(
                "logger: must be a subclass of lightning.pytorch.loggers.Logger, "
                f"not {type(logger).__name__}"
            )
        if isinstance(logger, CSVLog):
            logger.resume_step = resume_step
    return loggers


def build_trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Build Lightning's trainer with the settings of `cfg.trainer`.

    Args:
        cfg: config of a command.
        callbacks: callbacks of the trainer.
        loggers: loggers of the trainer; without loggers, no learning rate is monitored.

    Raises:
        UsageError: a setting is unknown, is set by qat itself, or is refused by Lightning; the
            machine lacks the accelerator; or `sync_batchnorm` is set on CPUs.
    """
    settings: dict[str, Any] = {}
    for key, value in cfg.trainer.items():
        is_object = OmegaConf.is_dict(value) and "_target_" in value
        settings[key] = instantiate(value, f"trainer.{key}") if is_object else to_plain(value)
    # Inference mode is off in two cases: sharded weights that were gathered in inference mode could
    # not be trained afterwards, and a compiled model would need a second graph for this mode.
    if settings.get("strategy") == SHARDED or compile_mode(cfg):
        settings["inference_mode"] = False
    num_processes = local_processes(settings) * settings.get("num_nodes", 1)
    settings["strategy"] = choose_strategy(settings.get("strategy", "auto"), num_processes)
    if settings.get("max_steps", -1) > 0:
        callbacks = [StepLimit(settings.pop("max_steps")), *callbacks]
    if not loggers:
        callbacks = [
            callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)
        ]
    plugins = [AtomicCheckpointIO(), *cluster_environments()]
    if settings.get("sync_batchnorm"):
        plugins.append(SyncBatchNorms())
    own_settings: dict[str, Any] = {
        "callbacks": callbacks,
        "logger": loggers or False,
        "plugins": plugins,
        "default_root_dir": cfg.run_dir,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        # If this were True without a checkpoint callback, Lightning would add its own.
        "enable_checkpointing": any(isinstance(callback, Checkpointing) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
    }
    _check_names(settings, own_settings)
    try:
        trainer = Trainer(**settings, **own_settings)
    except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        message = " ".join(str(error).split())
        names = _mentioned_settings(settings, message) or ["accelerator", "devices", "strategy"]
        values = ", ".join(f"trainer.{name}={cfg.trainer.get(name)!r}" for name in names)
        raise UsageError(f"{values}: {message}") from error
    if settings.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UsageError(
            "trainer.sync_batchnorm=true: torch does not synchronize batch norms on CPUs; "
            "must be false"
        )
    return trainer


def _check_names(settings: Mapping[str, Any], own_settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a setting that qat sets, or that Lightning does not have."""
    allowed = inspect.signature(Trainer).parameters
    for name, value in settings.items():
        if name in own_settings:
            raise UsageError(
                f"trainer.{name}={value!r}: must be left out; "
                "qat sets it, for example from callbacks, logger or run_dir"
            )
        if name not in allowed:
            raise UsageError(unknown_message(f"trainer.{name}={value!r}", name, allowed))


def _mentioned_settings(settings: Mapping[str, Any], message: str) -> list[str]:
    """Settings whose name or value occurs in an error message of Lightning."""
    names = []
    for name, value in settings.items():
        if re.search(rf"(?<![A-Za-z]){name}\b", message) or f"'{value}'" in message:
            names.append(name)
    return names


def use_less_memory(cfg: DictConfig, net: nn.Module) -> None:
    """Store fewer activations for the backward pass.

    With `memory=recompute`, attention probabilities are not stored; with
    `model.grad_checkpointing=true`, only the inputs of blocks are stored.

    Raises:
        UsageError: the model does not support gradient checkpointing.
    """
    set_execution(net, memory=cfg.memory)
    if not cfg.model.grad_checkpointing:
        return
    try:
        net.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    except (AttributeError, TypeError, ValueError, AssertionError) as error:
        name = display_name(cfg.model.name, cfg.model.args)
        raise UsageError(
            f"model.grad_checkpointing=true: {name} does not support it; must be false"
        ) from error


def compile_mode(cfg: DictConfig) -> bool | str:
    """The way in which models are compiled: False, True or "graphs".

    `compile=auto` means True on CUDA, unless `trainer.strategy` shards the weights.

    Raises:
        UsageError: `compile` is not true, false, auto or graphs, or is graphs without CUDA.
    """
    setting = cfg.get("compile", False)
    if setting not in {True, False, "auto", "graphs"}:
        raise UsageError(f"compile={setting!r}: must be one of true, false, auto, graphs")
    accelerator = cfg.trainer.get("accelerator", "auto")
    on_cuda = torch.cuda.is_available() and str(accelerator) in {"auto", "gpu", "cuda"}
    if setting == "graphs" and not on_cuda:
        raise UsageError(
            "compile=graphs: CUDA graphs need CUDA, which is not available with "
            f"trainer.accelerator={accelerator!r}; must be one of true, false, auto"
        )
    if setting == "auto":
        return on_cuda and cfg.trainer.get("strategy") != SHARDED
    return setting


def compile_nets(cfg: DictConfig, net: nn.Module, teacher: Teacher | None) -> None:
    """Compile student and teacher in place, without graph breaks, if `compile_mode` says so.

    Names in state dicts do not change. First, a single operation is compiled as a test. If the test
    fails with `compile=auto`, the models are not compiled.

    Raises:
        UsageError: torch cannot compile on this machine, and `compile` is not auto.
    """
    mode = compile_mode(cfg)
    if not mode:
        return
    device = next(net.parameters()).device
    try:
        torch.compile(torch.square)(torch.zeros(2, device=device))
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        reason = f"torch cannot compile for {device.type} here ({message})"
        if cfg.compile != "auto":
            setting = str(cfg.compile).lower()
            raise UsageError(f"compile={setting}: {reason}; must be false") from error
        log.warning("compile=auto: the model is not compiled: %s", reason)
        return
    # Forget compiled models of earlier jobs of a sweep: they count towards torch's limit on graphs.
    torch.compiler.reset()
    compile_in_place(net, recompute=cfg.memory == "recompute", cuda_graphs=mode == "graphs")
    if teacher is not None:
        teacher.compile(cuda_graphs=mode == "graphs")
