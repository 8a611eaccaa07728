"""Checks of settings, data and models with which a run would fail late, or train on nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, callbacks
from torch import nn

import qat.data
from qat.callbacks.last import FILE_NAME as LAST_FILE
from qat.callbacks.last import LastCheckpoint
from qat.data import DataSettings, ImageData
from qat.errors import UsageError
from qat.launch.ranks import is_first
from qat.lit.strategies import SHARDED
from qat.losses import CompositeLoss
from qat.model.convert import check_input
from qat.model.metadata import classes_of
from qat.nn import LOGITS
from qat.spec import QuantRecipe
from qat.tasks.conf import options, values_of
from qat.utils.validate import check_int, check_number

log = logging.getLogger(__name__)
HALF_WEIGHTS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")
# Integer settings of Lightning's trainer, with their minimum values; -1 is "all" or "no limit".
# Lightning does not check the types.
INTEGERS = {
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
NOT_NULL = (
    "max_epochs",
    "max_steps",
    "num_nodes",
    "accumulate_grad_batches",
    "limit_train_batches",
)
NOT_ZERO = ("max_steps", "limit_train_batches", "limit_test_batches", "val_check_interval")
VAL_METRICS = ("val/top1", "val/top5", "val/loss")
# Datasets by the names that configs and checkpoints use.
DATASETS: dict[str, type[ImageData]] = {
    f"qat.data.{name}": kind
    for name, kind in vars(qat.data).items()
    if isinstance(kind, type) and issubclass(kind, ImageData)
}
# The choices of `data=` that messages name first.
COMMON_DATA = ("imagefolder", "hf_parquet")
# Callbacks that change the length of the training or do not work with `QATModule`, and what to use
# instead.
UNFIT: dict[type[Callback], str] = {
    callbacks.BackboneFinetuning: "optimizer.layer_decay makes early layers learn more slowly",
    callbacks.BaseFinetuning: "train the frozen layers in a second run with ckpt=FILE",
    callbacks.BatchSizeFinder: "set data.batch_size",
    callbacks.GradientAccumulationScheduler: (
        "set trainer.accumulate_grad_batches, one value for the whole run"
    ),
    callbacks.LearningRateFinder: "a sweep compares learning rates: -m optimizer.lr=1e-4,1e-3",
    callbacks.ModelPruning: "prune the float model, then start from it with ckpt=FILE",
    callbacks.StochasticWeightAveraging: "callbacks=[default,ema] averages weights",
}


def check_callback(name: str, callback: object) -> None:
    """Check that a callback can be used in a run, and that its validation metric exists.

    Lightning would only notice a wrong metric after the first epoch.

    Raises:
        UsageError: the callback cannot be used.
    """
    kind = type(callback).__name__
    if not isinstance(callback, Callback):
        raise UsageError(
            f"callbacks.{name}: must be a subclass of lightning.pytorch.Callback, not {kind}"
        )
    for unfit, instead in UNFIT.items():
        if isinstance(callback, unfit):
            raise UsageError(f"callbacks.{name}: a run cannot have {kind}; {instead}")
    if isinstance(callback, callbacks.EarlyStopping):
        check_int(f"callbacks.{name}.patience", callback.patience, 0)
        # Lightning has negated `min_delta` if the lowest value is the best.
        sign = 1 if callback.mode == "max" else -1
        check_number(f"callbacks.{name}.min_delta", sign * callback.min_delta, 0)
    _check_mode(name, callback)
    _check_file_names(name, callback)
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str) or monitor in VAL_METRICS:
        return
    # Metrics of other groups, such as train/loss, are not known here.
    is_of_other_group = "/" in monitor and not monitor.startswith("val")
    if not is_of_other_group:
        raise UsageError(
            f"callbacks.{name}.monitor={monitor!r}: "
            f"must be a validation metric: {', '.join(VAL_METRICS)}"
        )


def _check_mode(name: str, callback: Callback) -> None:
    """Check that the best loss is the lowest, and the best accuracy the highest."""
    monitor = str(getattr(callback, "monitor", None))
    mode = getattr(callback, "mode", None)
    expected_mode = mode
    if "loss" in monitor:
        expected_mode = "min"
    elif "/top" in monitor:
        expected_mode = "max"
    if mode is None or mode == expected_mode:
        return
    extreme = "lowest" if expected_mode == "min" else "highest"
    raise UsageError(
        f"callbacks.{name}.mode={mode!r}: the best {monitor} is the {extreme}; "
        f"must be {expected_mode}"
    )


def _check_file_names(name: str, callback: Callback) -> None:
    """Check that the file names of several checkpoints of a callback differ."""
    save_top_k = getattr(callback, "save_top_k", 1)
    filename = getattr(callback, "filename", None)
    has_version = getattr(callback, "_enable_version_counter", True)
    keeps_several = save_top_k not in {0, 1}
    has_fixed_name = filename and "{" not in filename and not has_version
    if keeps_several and has_fixed_name:
        raise UsageError(
            f"callbacks.{name}.save_top_k={save_top_k}: must be 1, "
            f"as all files are {filename}.ckpt; callbacks=[default,best_k] keeps several"
        )


def check_writers(name: str, callback: Callback, writers: dict[Path, str]) -> None:
    """Check that no earlier callback writes to the checkpoint file of this one.

    Args:
        name: name of the callback in `callbacks.*`.
        callback: the callback; only checkpoints with fixed file names are checked.
        writers: names of the earlier callbacks by file; the callback is added.

    Raises:
        UsageError: two callbacks write to the same file.
    """
    filenames = []
    if isinstance(callback, LastCheckpoint) or getattr(callback, "save_last", False):
        filenames.append(LAST_FILE)
    pattern = getattr(callback, "filename", None)
    if pattern and "{" not in pattern:
        filenames.append(f"{pattern}.ckpt")
    for filename in filenames:
        path = Path(getattr(callback, "dirpath", None) or "").resolve() / filename
        if path in writers:
            raise UsageError(
                f"callbacks.{writers[path]} and callbacks.{name}: both write {filename}; "
                "their files must differ"
            )
        writers[path] = name


def check_classifier(net: nn.Module, data: ImageData) -> None:
    """Check that the model accepts images of the data and returns logits (1, classes) for an image.

    Raises:
        UsageError: the model does not do this, or the data have fewer than two classes.
    """
    num_classes = data.settings.num_classes
    if num_classes < 2:
        raise UsageError(f"data.num_classes={num_classes}: must be at least 2")
    logits = check_input(net, data.input_size).get(LOGITS)
    if logits is not None and logits.ndim == 2:
        return
    output = "several tensors"
    if logits is not None:
        output = f"(1, {', '.join(map(str, logits.shape[1:]))})"
    raise UsageError(
        f"model.args: the model returns {output} for an image; "
        "must be a classifier, which returns (1, classes)"
    )


def check_classes(net: nn.Module, data: ImageData, origin: str) -> None:
    """Check that the class names of the data have the model's order; warn if names differ.

    Do nothing if names are unknown, or if model and data have different numbers of classes.

    Raises:
        UsageError: the names are the same, but in another order.
    """
    model_classes = classes_of(net)
    data_classes = data.named_classes()
    if not model_classes or not data_classes or len(model_classes) != len(data_classes):
        return
    if model_classes == data_classes:
        return
    pairs = enumerate(zip(model_classes, data_classes, strict=True))
    class_id = next(class_id for class_id, (expected, actual) in pairs if expected != actual)
    difference = (
        f"{origin}: class {class_id} of the model is {model_classes[class_id]!r}, "
        f"class {class_id} of the data is {data_classes[class_id]!r}"
    )
    if sorted(model_classes) == sorted(data_classes):
        raise UsageError(
            f"{difference}: the data have the model's classes in another order; "
            "the orders must agree"
        )
    if is_first():
        log.warning("%s: names differ; assuming the same classes", difference)


def check_unread(data: ImageData, read_elsewhere: Collection[str] = ()) -> None:
    """Check that the user changed no setting that the dataset ignores.

    Args:
        data: the dataset; it is not checked if its class is the user's own.
        read_elsewhere: names of settings that the command itself reads.

    Raises:
        UsageError: a setting that the dataset ignores was changed; the message names the choices of
            `data=` that read it.
    """
    groups = {}
    for group in options("data"):
        groups[group] = DATASETS[values_of("data", group)["_target_"]]
    own_group = next((group for group, kind in groups.items() if kind is type(data)), None)
    if own_group is None:
        return
    for name in data.UNREAD:
        value = getattr(data.settings, name)
        if name in read_elsewhere or value == getattr(DataSettings, name):
            continue
        readers = [group for group, kind in groups.items() if name not in kind.UNREAD]
        first_reader = next(group for group in COMMON_DATA if group in readers)
        other_readers = ", ".join(group for group in readers if group != first_reader)
        raise UsageError(
            f"data.{name}={value!r}: data={own_group} ignores data.{name}; "
            f"data={first_reader} uses it, as do {other_readers}"
        )


def check_sharding(strategy: object, name: str, part: object) -> None:
    """Check that a callback or a loss term works with the strategy.

    Args:
        strategy: value of `trainer.strategy`.
        name: words for the callback or term in the message.
        part: the callback or the term.

    Raises:
        UsageError: the strategy shards weights, but the callback or term needs unsharded weights.
    """
    if strategy != SHARDED:
        return
    averages_weights = isinstance(part, callbacks.WeightAveraging)
    if averages_weights or getattr(part, "needs_whole_weights", False):
        raise UsageError(
            f"trainer.strategy={SHARDED!r}: {name} needs unsharded weights; must be ddp"
        )


def check_combinations(
    trainer: Mapping[str, Any], compile_setting: object, recipe: QuantRecipe, loss: CompositeLoss
) -> None:
    """Check that precision, strategy, compilation, recipe and loss can be combined.

    Args:
        trainer: settings of `trainer.*`.
        compile_setting: value of `compile`.
        recipe: recipe with which the model is trained.
        loss: the loss.

    Raises:
        UsageError: two of the settings cannot be combined.
    """
    precision = str(trainer["precision"])
    # Weights in 16 bits lose small updates: in bfloat16 those below 1/512 of the weight, in float16
    # those below 1/4096. So most codes would never change.
    if recipe.name != "fp" and precision in HALF_WEIGHTS:
        raise UsageError(
            f"trainer.precision={precision!r}: a quantized model needs weights of 32 bits or more; "
            "must be one of 32-true, bf16-mixed, 16-mixed, 64-true"
        )
    if trainer.get("strategy") != SHARDED:
        return
    strategy = f"trainer.strategy={SHARDED!r}"
    if compile_setting in {True, "graphs"}:
        setting = f"compile={str(compile_setting).lower()}"
        raise UsageError(
            f"{setting}: {strategy} gathers weights inside the compiled graph; must be false"
        )
    if precision in {"16-mixed", "16"}:
        raise UsageError(
            f"trainer.precision={precision!r}: {strategy} has no gradient scaler; "
            "must be 32-true or bf16-mixed"
        )
    for name, term in loss.terms.items():
        check_sharding(SHARDED, f"the loss term {name}", term)


def check_patches(net: nn.Module, data: ImageData) -> None:
    """Check that images consist of whole patches if timm would ignore pixels at the edge.

    Raises:
        UsageError: the patch size does not divide the image size.
    """
    embedding = getattr(net, "patch_embed", None)
    patch_size = getattr(embedding, "patch_size", None)
    if not isinstance(patch_size, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return
    image_size = data.settings.image_size
    if any(image_size % side for side in patch_size):
        raise UsageError(
            f"data.image_size={image_size}: must be a multiple of the model's patch size "
            f"{' x '.join(map(str, patch_size))} (data.patch_size)"
        )


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Check types and ranges of settings of `trainer.*`.

    With some values that Lightning accepts, it would train on nothing, or never validate.

    Raises:
        UsageError: a value is not allowed; the message names the first one.
    """
    for name in NOT_NULL:
        if settings.get(name, 1) is None:
            raise UsageError(f"trainer.{name}=null: must be a number")
    for name, minimum in INTEGERS.items():
        if settings.get(name) is not None:
            check_int(f"trainer.{name}", settings[name], minimum)
    for name in NUMBERS:
        if settings.get(name) is not None:
            check_number(f"trainer.{name}", settings[name], 0)
    for name in NOT_ZERO:
        if settings.get(name) == 0:
            unlimited = "-1 (no limit) or " if name == "max_steps" else ""
            raise UsageError(f"trainer.{name}={settings[name]!r}: must be {unlimited}above 0")
    max_time = settings.get("max_time")
    if isinstance(max_time, int | float):
        raise UsageError(f"trainer.max_time={max_time}: must be DD:HH:MM:SS")
    # `00:00:00:00` and `{hours: 0}` contain no digit except 0.
    if max_time is not None and not re.search("[1-9]", str(max_time)):
        raise UsageError(
            f"trainer.max_time={str(max_time)!r}: must be DD:HH:MM:SS and above 0, "
            "so that at least one step is taken"
        )
    epochs = settings["max_epochs"]
    interval = settings.get("check_val_every_n_epoch")
    if interval is not None and interval > epochs:
        raise UsageError(
            f"trainer.check_val_every_n_epoch={interval}: no epoch would be validated; "
            f"must be an integer from 1 to {epochs}"
        )
