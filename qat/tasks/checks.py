"""Settings that Lightning or Python would take and then train on nothing, or fail on late."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, callbacks, seed_everything
from omegaconf import DictConfig, open_dict
from torch import nn

from qat import kernels
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch.ranks import is_first
from qat.lit.strategies import SHARDED
from qat.losses import CompositeLoss
from qat.model.checkpoint import classes_of
from qat.model.convert import check_input
from qat.model.pretrained import CONFIG, PREFIX, WEIGHTS, fetch, is_ours
from qat.model.start import check_model
from qat.spec import QuantRecipe
from qat.tasks.build import build_data
from qat.tasks.settings import check
from qat.utils.text import json_object
from qat.utils.validate import check_int, check_number

log = logging.getLogger(__name__)
HALF_WEIGHTS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")
# Settings of Lightning's trainer that it compares with numbers before it asks whether they are any. -1 is all, or no end.
WHOLE = {
    "max_epochs": 1,
    "accumulate_grad_batches": 1,
    "num_nodes": 1,
    "check_val_every_n_epoch": 1,
    "max_steps": -1,
    "min_steps": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
NUMBERS = (
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "val_check_interval",
)
VAL_METRICS = ("val/top1", "val/top5", "val/loss")
# Callbacks of Lightning that change what a schedule was laid out for, or want another module; what there is instead.
UNFIT: dict[type[Callback], str] = {
    callbacks.BackboneFinetuning: "optimizer.layer_decay has early layers learn more slowly",
    callbacks.BaseFinetuning: "train what stays frozen in a second run with ckpt=FILE",
    callbacks.BatchSizeFinder: "set data.batch_size",
    callbacks.GradientAccumulationScheduler: "set trainer.accumulate_grad_batches, one value for the whole run",
    callbacks.LearningRateFinder: "a sweep compares learning rates: -m optimizer.lr=1e-4,1e-3",
    callbacks.ModelPruning: "prune the float model, then start from it with ckpt=FILE",
    callbacks.StochasticWeightAveraging: "callbacks=[default,ema] averages weights",
}


def check_settings(cfg: DictConfig) -> None:
    """Check the settings of a command; use the kernels that it names, and its seed.

    Raises:
        UsageError: an unknown setting, a value of another type, or one that cannot work.
    """
    check(cfg)
    _settle_hub(cfg)
    if "_target_" in cfg.data and cfg.data.get("num_classes", 0) is None:
        cfg.data.num_classes = build_data(
            cfg
        ).settings.num_classes  # the model is built from the config
    kernels.use(cfg.get("kernels", kernels.CHOICES[0]))
    if cfg.command != "export":
        check_trainer(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)


def _settle_hub(cfg: DictConfig) -> None:
    """Write out what `model=hf-hub:user/name` stands for: the `ckpt` of a net of ours, or timm's architecture, arguments and weights.

    Raises:
        UsageError: it cannot be fetched, is no net of timm's, or is one of ours and another start is set as well.
    """
    name = cfg.model.name
    if not (name or "").startswith(PREFIX):
        return
    folder = fetch(name.removeprefix(PREFIX), f"model={name}")
    config, wanted, weights = (
        json_object(folder / CONFIG),
        cfg.model.pretrained,
        str(folder / WEIGHTS),
    )
    cfg.model.pretrained = False
    if is_ours(folder):
        if cfg.ckpt or cfg.model.weights:
            raise UsageError(
                f"{'ckpt' if cfg.ckpt else 'model.weights'} and model={name} are set: a model starts from one of them"
            )
        cfg.ckpt, cfg.model.name = weights, None
        return
    check_model(f"model={name}: architecture", config.get("architecture"))
    with open_dict(cfg):
        given = {
            key: value for key, value in cfg.model.args.items_ex(resolve=False) if value is not None
        }
        cfg.model.args = {**(config.get("model_args") or {}), **given}
    cfg.model.name = config["architecture"]
    if wanted:
        cfg.model.weights = weights
    described = config.get("pretrained_cfg") or {}
    for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        if key in cfg.data and cfg.data[key] is None and isinstance(described, dict):
            cfg.data[key] = described.get(key)


def check_callback(name: str, callback: object) -> None:
    """Raise `UsageError` unless it is a callback that can work, and what it monitors may exist: Lightning says so after an epoch."""
    if not isinstance(callback, Callback):
        raise UsageError(
            f"callbacks.{name}: {type(callback).__name__} is not a subclass of lightning.pytorch.Callback"
        )
    for kind, instead in UNFIT.items():
        if isinstance(callback, kind):
            raise UsageError(
                f"callbacks.{name}: a run cannot have {type(callback).__name__}; {instead}"
            )
    monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
    best = "min" if "loss" in str(monitor) else "max" if "/top" in str(monitor) else mode
    if mode not in {None, best}:
        where = "lowest" if best == "min" else "highest"
        raise UsageError(
            f"callbacks.{name}.mode={mode!r}: the best {monitor} is the {where}; must be {best}"
        )
    kept, file = getattr(callback, "save_top_k", 1), getattr(callback, "filename", None)
    if (
        kept not in {0, 1}
        and "{" not in (file or "{")
        and not getattr(callback, "_enable_version_counter", True)
    ):
        raise UsageError(
            f"callbacks.{name}.save_top_k={kept}: must be 1 where all files are {file}.ckpt; callbacks=[default,best_k] keeps several"
        )
    if (
        isinstance(monitor, str)
        and (monitor.startswith("val") or "/" not in monitor)
        and monitor not in VAL_METRICS
    ):
        raise UsageError(
            f"callbacks.{name}.monitor={monitor!r}: must be one of those of the validation: {', '.join(VAL_METRICS)}"
        )


def check_classifier(net: nn.Module, data: ImageData) -> None:
    """Raise `UsageError` unless images of the data pass through the net, and it gives a number for each class."""
    if data.settings.num_classes < 2:
        raise UsageError(f"data.num_classes={data.settings.num_classes}: must be at least 2")
    shape = check_input(net, data.input_size)
    if shape is None or len(shape) != 2:
        gives = "several tensors" if shape is None else f"(1, {', '.join(map(str, shape[1:]))})"
        raise UsageError(
            f"model.args: the model returns {gives} for an image; must be a classifier, which returns (1, classes)"
        )


def check_classes(net: nn.Module, data: ImageData, origin: str) -> None:
    """Raise `UsageError` if the data have the classes of a net in another order; warn if they call them otherwise."""
    had, has = classes_of(net), data.named_classes()
    if not had or not has or len(had) != len(has) or had == has:
        return
    number = next(n for n, (old, new) in enumerate(zip(had, has, strict=True)) if old != new)
    said = f"{origin}: its class {number} is {had[number]!r}, that of the data {has[number]!r}"
    if sorted(had) == sorted(has):
        raise UsageError(
            f"{said}: the same classes in another order; must be data with the order that it was trained on"
        )
    if is_first():
        log.warning("%s: names differ; assuming the same classes", said)


def check_sharding(cfg: DictConfig, name: str, part: object) -> None:
    """Raise `UsageError` if a callback or a term of the loss looks at whole weights, where each process has a part of them."""
    if cfg.trainer.get("strategy") == SHARDED and (
        getattr(part, "needs_whole_weights", False) or isinstance(part, callbacks.WeightAveraging)
    ):
        raise UsageError(f"trainer.strategy={SHARDED!r}: {name} needs whole weights; must be ddp")


def check_options(cfg: DictConfig, recipe: QuantRecipe, loss: CompositeLoss) -> None:
    """Raise `UsageError` if steps cannot be computed as the settings say.

    Quantized nets need float masters: a step of 1e-3 of a weight is lost in 8 bits of mantissa, and no code ever changes.
    """
    precision, strategy = str(cfg.trainer.precision), f"trainer.strategy={SHARDED!r}"
    if recipe.name != "fp" and precision in HALF_WEIGHTS:
        raise UsageError(
            f"trainer.precision={precision!r}: a quantized model needs float weights; must be one of 32-true, bf16-mixed, 16-mixed, 64-true"
        )
    if cfg.trainer.get("strategy") == SHARDED:
        if cfg.compile in {True, "graphs"}:
            raise UsageError(
                f"compile={str(cfg.compile).lower()}: {strategy} gathers weights inside the compiled graph; must be false"
            )
        if precision == "16-mixed":
            raise UsageError(
                f"trainer.precision={precision!r}: {strategy} has no gradient scaler; must be 32-true or bf16-mixed"
            )
        for name, term in loss.terms.items():
            check_sharding(cfg, f"the loss term {name}", term)


def check_patches(net: nn.Module, data: ImageData) -> None:
    """Raise `UsageError` unless images are whole patches: timm would leave out the pixels at the edge."""
    embedding = getattr(net, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return
    size = data.settings.image_size
    if any(size % side for side in patch):
        raise UsageError(
            f"data.image_size={size}: must be a multiple of the model's patch size {patch[0]} (data.patch_size)"
        )


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` on the first of Lightning's settings that it would take and then train on nothing, or never validate."""
    for name, lowest in WHOLE.items():
        if settings.get(name) is not None or name == "max_epochs":
            check_int(f"trainer.{name}", settings.get(name), lowest)
    for name in NUMBERS:
        if settings.get(name) is not None:
            check_number(f"trainer.{name}", settings[name], 0)
    for name in ("max_steps", "limit_train_batches", "limit_test_batches", "val_check_interval"):
        if settings.get(name) == 0:
            raise UsageError(f"trainer.{name}={settings[name]!r}: must be above 0")
    time = settings.get("max_time")
    if isinstance(time, int | float):
        raise UsageError(f"trainer.max_time={time}: must be DD:HH:MM:SS")
    if time is not None and not re.search("[1-9]", str(time)):  # `00:00:00:00`, or {hours: 0}
        raise UsageError(
            f"trainer.max_time={str(time)!r}: must be above 0, so that at least one step is taken"
        )
    epochs, every = settings["max_epochs"], settings.get("check_val_every_n_epoch")
    if every is not None and every > epochs:
        raise UsageError(
            f"trainer.check_val_every_n_epoch={every}: no epoch would be validated; must be an integer from 1 to {epochs}"
        )
