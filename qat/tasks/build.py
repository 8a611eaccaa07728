"""From a config to objects, each of them built and checked before the first step."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import timm.scheduler.scheduler
import torch
from hydra.errors import InstantiationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat.biases import invent_biases
from qat.callbacks import CGA, LastCheckpoint, StepSeed
from qat.checkpoint import Checkpoint, build_from, read_checkpoint
from qat.conversion import convert
from qat.data import ImageData
from qat.errors import UsageError
from qat.interop import OfqNet, is_ofq, net_from_ofq
from qat.lit.checkpoint_io import AtomicCheckpointIO
from qat.lit.csv_log import continue_csv
from qat.lit.optim import INTERVALS, build_optimizer, cosine_schedule, scaled_lr
from qat.lit.optimizer_state import with_optimizer_state
from qat.losses import CompositeLoss
from qat.scales import assert_ready, initialize_scales
from qat.spec import QuantRecipe, check_choice, check_number, check_whole
from qat.start import Start, from_checkpoint, from_net, from_pretrained, from_scratch, from_weights
from qat.tasks.checks import check_callback, check_keys, check_trainer
from qat.transfer import copy_scales, forget_attention_weights

log = logging.getLogger(__name__)

# Both repeat what the first lines of a run say already.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("timm").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own use of torch
warnings.filterwarnings("ignore", message=".*does not have many workers")  # small data are in memory
warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")  # Hydra made it
warnings.filterwarnings("ignore", message="You requested to overfit but enabled .* dataloader shuffling")  # which is what it turns off
warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than the logging interval")


INITS = ("full", "reference")
SCHEDULE = ("interval", "warmup_epochs", "cooldown_epochs", "warmup_lr", "min_lr")


def plain(cfg: Any) -> Any:
    """A config node as dicts, lists and scalars, interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def instantiate(node: DictConfig, setting: str) -> Any:
    """What `_target_` of a config node makes, from plain arguments.

    Raises:
        UsageError: there is no such class, or it does not take the arguments; names `setting`.
    """
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise UsageError(f"{setting}={plain(node)!r}: allowed is what makes an object: {setting}._target_=package.module.Class")
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from error
        raise UsageError(f"{setting}._target_={node.get('_target_')!r}: {' '.join(str(error.__cause__ or error).split())}") from error


def build_data(cfg: DictConfig) -> ImageData:
    """The dataset of `cfg.data`.

    Raises:
        UsageError: it is not an `ImageData`.
    """
    data = instantiate(cfg.data, "data")
    if not isinstance(data, ImageData):
        raise UsageError(f"data._target_={cfg.data.get('_target_')!r}: allowed are subclasses of qat.data.ImageData")
    return data


def build_recipe(cfg: DictConfig) -> QuantRecipe:
    """The recipe of `cfg.quant`.

    Raises:
        UsageError: it has a key that is no knob, or a value that cannot work.
    """
    knobs = [field.name for field in dataclasses.fields(QuantRecipe)]
    for key in cfg.quant:
        if key not in knobs:
            raise UsageError(f"quant.{key}: allowed are {', '.join(knobs)}")
    return QuantRecipe(**plain(cfg.quant))


def model_args(cfg: DictConfig) -> dict[str, Any]:
    """Arguments for `timm.create_model`: those of the config that are not null.

    Raises:
        UsageError: they contradict the data.
    """
    args = {k: v for k, v in plain(cfg.model.args).items() if v is not None}
    for name in ("num_classes", "in_chans"):
        if name in args and args[name] != cfg.data[name]:
            raise UsageError(f"model.args.{name}={args[name]!r}: the data have {cfg.data[name]}; set data.{name} if that is wrong")
    return args


def import_modules(cfg: DictConfig) -> None:
    """Import `model.imports`: files that register swaps for a model family, or models with timm.

    Raises:
        UsageError: one of them cannot be imported.
    """
    names = plain(OmegaConf.select(cfg, "model.imports")) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"model.imports={names!r}: allowed is a list of Python modules, [package.module]")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"model.imports={name!r}: {error}") from error


def authors_net(cfg: DictConfig, checkpoint: Checkpoint) -> OfqNet | None:
    """The net of a file that the paper's own code wrote; None if `ckpt_format` or the file say that it is another one.

    Raises:
        UsageError: the file cannot be read as what it should be.
    """
    if cfg.ckpt_format == "ofq" or (cfg.ckpt_format == "auto" and checkpoint.meta is None and is_ofq(checkpoint.state)):
        return net_from_ofq(checkpoint, OmegaConf.select(cfg, "model.name"), cfg.ckpt_bits, cfg.ckpt_act_bits)
    for setting in ("ckpt_bits", "ckpt_act_bits"):
        if cfg[setting] is not None:
            raise UsageError(f"{setting}={cfg[setting]!r}: only for files of the paper's code (ckpt_format=ofq), others say their bits")
    return None


def build_start(cfg: DictConfig) -> Start:
    """The float net and its weights: `ckpt`, `model.weights`, `model.pretrained` or scratch.

    Raises:
        UsageError: more than one of them is set, or the one that is does not work.
    """
    import_modules(cfg)
    given = [name for name in ("ckpt", "model.weights", "model.pretrained") if OmegaConf.select(cfg, name)]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are set: a net starts from one of them")
    name, args = cfg.model.name, model_args(cfg)
    if cfg.get("ckpt"):
        checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format)
        theirs = authors_net(cfg, checkpoint)
        if theirs is None:
            return from_checkpoint(name, args, checkpoint, reset_head=bool(cfg.model.reset_head))
        start = from_net(name, args, theirs.net, origin=f"ckpt={str(cfg.ckpt)!r}", reset_head=bool(cfg.model.reset_head))
        start.notes += theirs.notes
        return start
    if cfg.model.weights:
        is_jax = str(cfg.model.weights).endswith(".npz")
        state = None if is_jax else read_checkpoint(cfg.model.weights, fmt="timm", setting="model.weights").state
        return from_weights(name, args, cfg.model.weights, state)
    return from_pretrained(name, args) if cfg.model.pretrained else from_scratch(name, args)


def build_resumed(checkpoint: Checkpoint) -> Start:
    """The net of a run that is continued, whatever it started from."""
    return Start(build_from(checkpoint).train(), [f"step {checkpoint.step} of this run ({checkpoint.path.name})"])


def quantize(start: Start, recipe: QuantRecipe, data: ImageData, *, init: str = "full") -> list[str]:
    """Convert the net in place and fill its scales: copied where the start has them, else from data.

    Args:
        start: the float net, and the quantized one it came from.
        recipe: what to do to it.
        data: where calibration images come from.
        init: `full` keeps all weights; `reference` loses those that the paper's code loses, and invents the biases that it invents.

    Returns:
        What a person should be told, a line each.
    """
    check_choice("model.init", init, INITS)
    as_there = init == "reference" and recipe.name != "fp"
    lost = invent_biases(start.net) if as_there else []
    convert(start.net, recipe, input_size=data.input_size)
    if recipe.name == "fp":
        return []
    lost += forget_attention_weights(start.net) if as_there else []
    notes = [f"drawn anew, as in the paper's code: {', '.join(lost)}"] if lost else []
    return notes + _fill_scales(start, data)


def _fill_scales(start: Start, data: ImageData) -> list[str]:
    copied, missing = ([], []) if start.source is None else copy_scales(start.source, start.net)
    batches = data.calibration_batches()
    initialize_scales(start.net, batches)
    assert_ready(start.net)
    images = sum(len(batch) for batch in batches)
    if not copied:
        return [f"scales initialised from {images} training images"]
    if not missing:
        return [f"scales of all {len(copied)} quantizers copied"]
    return [f"scales of {len(copied)} quantizers copied, of {len(missing)} initialised from {images} images: {', '.join(missing)}"]


def build_loss(cfg: DictConfig) -> CompositeLoss:
    """The terms of `cfg.loss`."""
    return CompositeLoss({name: instantiate(term, f"loss.terms.{name}") for name, term in cfg.loss.terms.items()})


def build_optimizer_factory(cfg: DictConfig, trainer: Trainer) -> Any:
    """A function from a net to its optimizer; tried on one parameter, so that a mistake shows before anything is trained."""
    settings = plain(cfg.optimizer)
    check_number("optimizer.lr", settings.get("lr"), 0, above=True)
    scaling = {name: settings.pop(name) for name in ("lr_base_batch", "lr_batch_rule") if name in settings}
    settings["lr"] = scaled_lr(settings["lr"], global_batch=global_batch(cfg, trainer), **scaling)
    if settings.get("layer_decay") is not None:
        check_number("optimizer.layer_decay", settings["layer_decay"], 0, above=True, highest=1)
    build_optimizer(nn.Linear(1, 1), **settings | {"layer_decay": None})
    return partial(build_optimizer, **settings)


def take_optimizer_state(cfg: DictConfig, make: Any, start: Start) -> Any:
    """The optimizer factory, with the state of `ckpt`'s optimizer under `ckpt_optimizer=true`; the start says so.

    Raises:
        UsageError: the setting is neither true nor false, or `ckpt` has no such state.
    """
    if not isinstance(cfg.ckpt_optimizer, bool):
        raise UsageError(f"ckpt_optimizer={cfg.ckpt_optimizer!r}: allowed are true and false")
    if not cfg.ckpt_optimizer:
        return make
    if not cfg.ckpt:
        raise UsageError("ckpt_optimizer=true: there is no checkpoint to take it from; set ckpt=PATH")
    make_and_fill, note = with_optimizer_state(make, cfg.ckpt, start.net)
    start.notes.append(note)
    return make_and_fill


def global_batch(cfg: DictConfig, trainer: Trainer) -> int:
    """Images per optimizer step: batch size x processes x accumulated batches."""
    check_whole("data.batch_size", cfg.data.batch_size, 1)
    return int(cfg.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches)


def build_scheduler_factory(cfg: DictConfig) -> Any:
    """A function from (optimizer, epochs, steps per epoch) to (schedule, interval)."""
    settings = plain(cfg.scheduler)
    check_keys("scheduler", settings, SCHEDULE)
    check_choice("scheduler.interval", settings["interval"], INTERVALS)
    for name in ("warmup_lr", "min_lr"):
        check_number(f"scheduler.{name}", settings[name], 0)
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
    callbacks: list[Callback] = [StepSeed(cfg.seed)]
    for name, callback_cfg in (cfg.get("callbacks") or {}).items():
        if callback_cfg is None:  # switched off: callbacks.best=null
            continue
        callback = instantiate(callback_cfg, f"callbacks.{name}")
        check_callback(name, callback)
        if isinstance(callback, ModelCheckpoint | LastCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(Path(cfg.run_dir) / "checkpoints")
        callbacks.append(callback)
    # Whoever logs the learning rate of a step looks behind the callback that sets it.
    return sorted(callbacks, key=lambda callback: not isinstance(callback, StepSeed | CGA))


def build_loggers(cfg: DictConfig, rows: list[dict[str, str]] | None = None) -> list[Logger]:
    """The loggers of `cfg.logger`; a CSV file goes on behind `rows`, those of the run that is continued."""
    loggers = [instantiate(one, f"logger.{name}") for name, one in (cfg.get("logger") or {}).items() if one is not None]
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise UsageError(f"logger: {type(logger).__name__} is not a subclass of lightning.pytorch.loggers.Logger")
        if isinstance(logger, CSVLogger):
            continue_csv(logger, rows or [])
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
    check_trainer(settings)
    monitors = [c for c in callbacks if loggers or type(c).__name__ not in {"LearningRateMonitor", "Throughput"}]
    try:
        return Trainer(
            **settings,
            callbacks=monitors,
            logger=loggers or False,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=cfg.run_dir,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(c, Checkpointing) for c in monitors),  # else Lightning adds one of its own
            enable_progress_bar=any("Progress" in type(c).__name__ for c in monitors),
        )
    except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        message = " ".join(str(error).split())
        raise UsageError(f"{_blamed(settings, message)}: {message}") from error


def _blamed(settings: Mapping[str, Any], message: str) -> str:
    """The settings that one of Lightning's complaints is about, with their values: those it names, else where a net runs."""
    named = [key for key in settings if re.search(rf"(?<![A-Za-z]){key}\b", message)]
    return ", ".join(f"trainer.{key}={settings.get(key)!r}" for key in named or ("accelerator", "devices", "strategy"))
