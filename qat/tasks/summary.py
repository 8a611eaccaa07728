"""Texts that a run logs: model, data and settings, scores, quantized layers, and the teacher."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import nn

from qat.data import DataSettings, ImageData
from qat.data.image_data import EncodedImageData
from qat.lit import QATModule, Teacher
from qat.lit.accuracy import evaluate
from qat.model.convert import conversion_of
from qat.model.cost import macs_by_bits, weights_by_bits
from qat.model.frozen import FrozenWeight, is_frozen
from qat.model.metadata import data_of
from qat.model.ptq_spec import PtqRecipe
from qat.model.report import conversion_report
from qat.model.start import Start
from qat.spec import QuantRecipe
from qat.tasks import fit
from qat.tasks.conf import command_words, display_name
from qat.utils.files import write_text
from qat.utils.tables import text_table
from qat.utils.text import chance_level_remark, format_count, format_si
from qat.utils.validate import FLOAT_BITS

log = logging.getLogger(__name__)
MIN_STEPS = 100  # in all epochs; with fewer, `describe_training` may warn
IMAGE_SETTINGS = ("crop_pct", "interpolation", "mean", "std")


def aligned_lines(title: str, entries: dict[str, str]) -> str:
    """A title, and aligned lines of keys and values."""
    width = max(len(key) for key in entries)
    return "\n".join([title, *(f"  {key.ljust(width)}  {value}" for key, value in entries.items())])


def describe_model(name: str, net: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Name, number of parameters (integer codes included) and image size of a model, as text."""
    num_params = sum(param.numel() for param in net.parameters())
    for module in net.modules():
        if isinstance(module, FrozenWeight):
            num_params += module.stored.numel()
    channels, height, width = input_size
    return (
        f"{display_name(name, getattr(net, '_model_args', {}))}, "
        f"{num_params / 1e6:.2f} M parameters, images {channels} x {height} x {width}"
    )


def describe_size(net: nn.Module, size_bytes: int) -> str:
    """Size of a model as text; if it is quantized but not frozen, with the command to pack it.

    `best.ckpt` is larger, because it contains everything that is needed to resume training.
    """
    size = format_si(size_bytes, "B")
    if conversion_of(net) is None:
        return f"{size} of float weights"
    if is_frozen(net):
        return f"packed size {size}"
    return f"packed size {size} (`{command_words('export')} format=packed` writes the file)"


def score_texts(results: Mapping[str, Any]) -> dict[str, str]:
    """Accuracies by name, as text, with a `note` if top-1 is close to chance."""
    texts = {}
    for k in (1, 5):
        accuracy = results.get(f"top{k}")
        if accuracy is not None:
            texts[f"top-{k}"] = f"{accuracy:.2f} %"
    note = chance_level_remark(results)
    if note:
        texts["note"] = note
    return texts


def describe_recipe(recipe: QuantRecipe) -> str:
    """Bits and quantizers in one line."""
    if recipe.name == "fp":
        return "fp: float, nothing is quantized"
    rules = f", {format_count(len(recipe.overrides), 'override')}" if recipe.overrides else ""
    if isinstance(recipe, PtqRecipe):
        return (
            f"{recipe.name}: placement {recipe.placement}, "
            f"weights {recipe.bits} bit ({recipe.weight_observer}), "
            f"activations {recipe.act_bits} bit per {recipe.act_scales} ({recipe.act_observer}), "
            f"softmax {recipe.softmax_bits} bit {recipe.softmax_quantizer}{rules}"
        )
    bias = f" (query bias: {recipe.qk_bias})" if recipe.attention == "qkr" else ""
    return (
        f"{recipe.name}: weights {recipe.bits} bit {recipe.weight_quantizer}, "
        f"activations {recipe.act_bits} bit {recipe.act_quantizer}, "
        f"attention {recipe.attention}{bias}, "
        f"stem {recipe.stem_bits} bit, heads {recipe.head_bits} bit{rules}"
    )


def describe_data(data: ImageData) -> str:
    """Name of the dataset, sizes of its splits and number of classes, as text."""
    counts = ", ".join(f"{len(data.split(split))} {split}" for split in data.splits)
    classes = format_count(data.settings.num_classes, "class")
    return f"{type(data).__name__.lower()}: {counts} images, {classes}"


def describe_images(settings: DataSettings, assumed: Sequence[str] = ()) -> str:
    """Describe how evaluation prepares images for a model.

    Args:
        settings: settings of the data.
        assumed: names of settings that are assumed, see `assumed_settings`.
    """
    scaling = "whole image, bicubic"
    if settings.crop_pct is not None:
        crop = f"{settings.crop_mode or 'center'} crop {settings.crop_pct:g}"
        scaling = f"{crop}, {settings.interpolation or 'bicubic'}"
    mean = " ".join(f"{number:.3g}" for number in settings.mean)
    std = " ".join(f"{number:.3g}" for number in settings.std)
    note = f"; assumed: {', '.join(assumed)}" if assumed else ""
    return f"{settings.image_size} x {settings.image_size}, {scaling}, mean {mean}, std {std}{note}"


def assumed_settings(
    cfg: DictConfig, own_data: Mapping[str, Any], net: nn.Module, data: ImageData
) -> list[str]:
    """Image settings that neither the user nor the file of a model's weights sets.

    The list is empty if no file is read, or if the file contains a complete data config.

    Args:
        cfg: config of a command.
        own_data: `cfg.data` before settings from a file were added.
        net: the model as read from the file.
        data: the dataset.
    """
    if not (cfg.ckpt or cfg.model.weights):
        return []
    stored_settings = data_of(net) or {}
    if "_target_" in stored_settings:
        return []
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    names_set_by_user = _data_settings(overrides)
    if isinstance(data, EncodedImageData):
        names_set_by_user |= {name for name in IMAGE_SETTINGS if own_data.get(name) is not None}
    known_names = names_set_by_user | stored_settings.keys()
    return [name for name in IMAGE_SETTINGS if name not in known_names]


def _data_settings(overrides: Iterable[str]) -> set[str]:
    """Names of the data settings in overrides such as `+data.mean=[0.5]`, without `data.`."""
    names = set()
    for override in overrides:
        setting = override.partition("=")[0].lstrip("+")
        if setting.startswith("data."):
            names.add(setting.removeprefix("data."))
    return names


def announce(
    title: str,
    net: nn.Module,
    name: str,
    recipe: QuantRecipe,
    input_size: tuple[int, int, int],
    **more: str,
) -> None:
    """Log the model and recipe of a command, and additional entries."""
    entries = {
        "model": describe_model(name, net, input_size),
        "recipe": describe_recipe(recipe),
    }
    log.info(aligned_lines(f"qat: {title}", entries | more))


def describe_device(trainer: Trainer) -> str:
    """Kind and number of devices."""
    return f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}"


def write_conversion(net: nn.Module, folder: Path) -> str:
    """Write `conversion.txt`, the report of a converted model, into a folder.

    Returns:
        A text for the log: a table with the percentages of weights and products at each bit-width,
        and the modules that stay float, with `*` for numbers in names.
    """
    report = conversion_report(net)
    write_text(folder / "conversion.txt", report.to_text() + "\n")
    float_modules: Counter[str] = Counter()
    for name, kind in report.stays_float:
        float_modules[f"{re.sub(r'[0-9]+', '*', name)} ({kind})"] += 1
    settings = conversion_of(net)
    assert settings is not None  # noqa: S101  (narrows a type)
    table = bits_table({
        "weights": weights_by_bits(net),
        "products": macs_by_bits(net, settings.input_size),
    })
    entries = {
        "stays float": ", ".join(f"{name} x{n}" for name, n in float_modules.items()),
        "layer by layer": "conversion.txt",
    }
    return aligned_lines(f"quantized\n{table}", entries)


def bits_table(columns: Mapping[str, Counter[int]]) -> str:
    """A text table: a row per bit-width, a column of percentages for each entry of `columns`."""
    rows = []
    widths: set[int] = set()
    for numbers in columns.values():
        widths |= {bits for bits, number in numbers.items() if number}
    for bits in sorted(widths):
        cells = []
        for numbers in columns.values():
            percentage = 100 * numbers[bits] / numbers.total()
            text = "< 0.1 %" if 0 < percentage < 0.05 else f"{percentage:.1f} %"
            cells.append(text)
        name = "float" if bits == FLOAT_BITS else f"{bits} bit"
        rows.append([name, *cells])
    return text_table(["share of", *columns], rows)


def describe_training(cfg: DictConfig, data: ImageData, trainer: Trainer) -> str:
    """Epochs and steps per epoch, as text; may warn if there are few steps.

    Unless batches are limited, the text mentions images that are left out of each epoch because
    they do not fill a batch.
    """
    loader = data.train_dataloader()
    num_images = len(loader.sampler)  # type: ignore[arg-type]
    batch_size = data.settings.batch_size
    num_unused = max(num_images - len(loader) * batch_size, 0) * trainer.world_size
    is_whole = fit.batch_limit(cfg) is None
    steps = fit.steps_per_epoch(cfg, data)
    epochs = 1 if cfg.trainer.fast_dev_run else cfg.trainer.max_epochs
    text = f"{format_count(epochs, 'epoch')} x {format_count(steps, 'step')}"
    if num_unused and is_whole:
        text += f", {num_unused} of {num_images * trainer.world_size} images left out of each"
    if is_whole and steps * epochs < MIN_STEPS and batch_size > 1:
        log.warning(
            "data.batch_size=%d: %s in all, too few to train a model well; "
            "smaller batches or a higher trainer.max_epochs make more steps",
            batch_size,
            format_count(steps * epochs, "training step"),
        )
    return text


def announce_run(
    cfg: DictConfig,
    recipe: QuantRecipe,
    data: ImageData,
    start: Start,
    module: QATModule,
    trainer: Trainer,
    lr: float,
) -> None:
    """Log model, data, initial weights, settings and outputs of a run.

    For a quantized model, also write `conversion.txt`.
    """
    optimizer = cfg.optimizer
    assumed = assumed_settings(cfg, cfg.data, start.source or start.net, data)
    training = [
        describe_training(cfg, data, trainer),
        f"global batch {fit.global_batch(cfg.data.batch_size, trainer)}",
        f"{optimizer.opt} lr {lr:.3g}",
        f"weight decay {optimizer.weight_decay:g}",
        f"seed {cfg.seed}",
    ]
    entries = {
        "data": describe_data(data),
        "images": describe_images(data.settings, assumed),
        "start": "; ".join(start.notes),
        "loss": ", ".join(module.loss.terms),
        "training": ", ".join(training),
        "device": f"{describe_device(trainer)}, precision {trainer.precision}",
        "outputs": str(cfg.run_dir),
    }
    announce("training", start.net, cfg.model.name, recipe, data.input_size, **entries)
    is_dry_run = cfg.trainer.fast_dev_run
    if not (is_dry_run or trainer.checkpoint_callbacks):
        log.warning(
            "callbacks: no callback writes checkpoints, so this model will not be saved; "
            "add default: callbacks=[default,...]"
        )
    if recipe.name == "fp":
        return
    log.info(write_conversion(start.net, Path(cfg.run_dir)))
    warn_of_random_weights(start, is_dry_run=bool(is_dry_run))


def warn_of_random_weights(start: Start, *, is_dry_run: bool) -> None:
    """Warn if quantized training, except a dry run, starts from random weights."""
    if start.is_random and not is_dry_run:
        log.warning(
            "random weights: a quantized training step takes longer than one in float; "
            "train with quant=fp first, "
            "then start from its checkpoint: ckpt=FP_RUN/checkpoints/best.ckpt"
        )


def announce_teacher(teacher: Teacher | None, data: ImageData, trainer: Trainer) -> float | None:
    """Evaluate the teacher before training, because a wrong teacher would waste the run.

    Returns:
        Top-1 of a float teacher in percent, with both heads if it has two; else None.
    """
    if teacher is None:
        return None
    device = trainer.strategy.root_device
    num_classes = data.settings.num_classes
    teacher.to(device)
    head_top1 = evaluate(teacher, data.test_dataloader(), num_classes, device)["top1"]
    top1 = head_top1
    note = ""
    if teacher.uses_one_of_two_heads:
        top1 = evaluate(teacher.net, data.test_dataloader(), num_classes, device)["top1"]
        note = f", class head only; {top1:.2f} % with both heads"
    log.info("teacher: %s top-1 %.2f %%%s", data.evaluation_split, head_top1, note)
    return top1 if conversion_of(teacher.net) is None else None
