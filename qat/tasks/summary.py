"""What a run says on the console: its first lines, its quantized layers in short, its teacher."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
from qat.tasks.conf import alias, typed
from qat.utils.files import write_text
from qat.utils.text import count, scaled, unlearned
from qat.utils.validate import FLOAT_BITS

log = logging.getLogger(__name__)
FEW_STEPS = 100  # of a whole training
OF_IMAGES = ("crop_pct", "interpolation", "mean", "std")
SHARE_WIDTH = 8  # letters of a column


def lines(title: str, entries: dict[str, str]) -> str:
    """A title and aligned `key  value` lines."""
    width = max(len(key) for key in entries)
    return "\n".join([title, *(f"  {key.ljust(width)}  {value}" for key, value in entries.items())])


def describe_model(name: str, net: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Name, parameters (those that are integer codes among them) and size of the images."""
    params = sum(p.numel() for p in net.parameters()) + sum(
        m.stored.numel() for m in net.modules() if isinstance(m, FrozenWeight)
    )
    chans, height, width = input_size
    return f"{alias(name, getattr(net, '_model_args', {}))}, {params / 1e6:.2f} M parameters, images {chans} x {height} x {width}"


def describe_size(net: nn.Module, size_bytes: int) -> str:
    """Bytes, and of which file: `best.ckpt` is larger, as it has what training goes on with."""
    if conversion_of(net) is None:
        return f"{scaled(size_bytes, 'B')} of float weights"
    return f"packed size {scaled(size_bytes, 'B')}" + (
        "" if is_frozen(net) else f" (`{typed('export')} format=packed` writes the file)"
    )


def scores(results: Mapping[str, Any]) -> dict[str, str]:
    """Accuracies in words, with a remark where they say little."""
    shown = {
        f"top-{k}": f"{top:.2f} %" for k in (1, 5) if (top := results.get(f"top{k}")) is not None
    }
    return shown | ({"note": note} if (note := unlearned(results)) else {})


def describe_recipe(recipe: QuantRecipe) -> str:
    """One line of bits and quantizers."""
    if recipe.name == "fp":
        return "fp: float, nothing is quantized"
    rules = f", {count(len(recipe.overrides), 'override')}" if recipe.overrides else ""
    if isinstance(recipe, PtqRecipe):
        return (
            f"{recipe.name}: placement {recipe.placement}, weights {recipe.bits} bit ({recipe.weight_observer}), "
            f"activations {recipe.act_bits} bit per {recipe.act_scales} ({recipe.act_observer}), "
            f"softmax {recipe.softmax_bits} bit {recipe.softmax_quantizer}{rules}"
        )
    bias = f" (query bias: {recipe.qk_bias})" if recipe.attention == "qkr" else ""
    return (
        f"{recipe.name}: weights {recipe.bits} bit {recipe.weight_quantizer}, activations {recipe.act_bits} bit {recipe.act_quantizer}, "
        f"attention {recipe.attention}{bias}, stem {recipe.stem_bits} bit, heads {recipe.head_bits} bit{rules}"
    )


def describe_data(data: ImageData) -> str:
    """Sizes of the splits."""
    counts = ", ".join(f"{len(data.split(s))} {s}" for s in data.splits)
    return f"{type(data).__name__.lower()}: {counts} images, {count(data.settings.num_classes, 'class')}"


def describe_images(settings: DataSettings, assumed: Sequence[str] = ()) -> str:
    """How images are prepared for a model in evaluation.

    Args:
        settings: of the data.
        assumed: names of what is not known of the model's weights, see `assumed_settings`.
    """
    scaling = "whole image, bicubic"
    if settings.crop_pct is not None:
        crop = f"{settings.crop_mode or 'center'} crop {settings.crop_pct:g}"
        scaling = f"{crop}, {settings.interpolation or 'bicubic'}"
    mean, std = (" ".join(f"{x:.3g}" for x in numbers) for numbers in (settings.mean, settings.std))
    end = f"; assumed: {', '.join(assumed)}" if assumed else ""
    return f"{settings.image_size} x {settings.image_size}, {scaling}, mean {mean}, std {std}{end}"


def assumed_settings(
    cfg: DictConfig, data_as_given: Mapping[str, Any], net: nn.Module, data: ImageData
) -> list[str]:
    """Settings of images that neither the file of a model's weights nor the user states.

    Args:
        cfg: of a command.
        data_as_given: `cfg.data` before settings of a file are added.
        net: the model as it was read.
        data: its images.
    """
    if not (cfg.ckpt or cfg.model.weights):
        return []
    stored = data_of(net) or {}
    if "_target_" in stored:
        return []
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    given = {name.partition("=")[0].lstrip("+").removeprefix("data.") for name in overrides}
    if isinstance(data, EncodedImageData):
        given |= {name for name in OF_IMAGES if data_as_given.get(name) is not None}
    return [name for name in OF_IMAGES if name not in stored and name not in given]


def announce(
    title: str,
    net: nn.Module,
    name: str,
    recipe: QuantRecipe,
    input_size: tuple[int, int, int],
    **more: str,
) -> None:
    """Log what a command works on."""
    log.info(
        lines(
            f"qat: {title}",
            {"model": describe_model(name, net, input_size), "recipe": describe_recipe(recipe)}
            | more,
        )
    )


def describe_device(trainer: Trainer) -> str:
    """What computes, and how many of it."""
    return f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}"


def conversion(net: nn.Module, folder: Path) -> str:
    """Write `conversion.txt`, the report of a converted model, into a folder.

    Returns:
        A table of the shares of weights and products at each bit-width, and what stays float, with
        numbers in names as `*`.
    """
    report = conversion_report(net)
    write_text(folder / "conversion.txt", report.to_text() + "\n")
    floats = Counter(
        f"{re.sub(r'[0-9]+', '*', name)} ({kind})" for name, kind in report.stays_float
    )
    settings = conversion_of(net)
    assert settings is not None  # noqa: S101  (narrows a type)
    table = shares_by_bits({
        "weights": weights_by_bits(net),
        "products": macs_by_bits(net, settings.input_size),
    })
    stays_float = ", ".join(f"{name} x{n}" for name, n in floats.items())
    return lines(
        "quantized", {**table, "stays float": stays_float, "layer by layer": "conversion.txt"}
    )


def shares_by_bits(columns: Mapping[str, Counter[int]]) -> dict[str, str]:
    """Rows of a table, by bit-width: the share of each column in percent."""
    rows = {"share of": "  ".join(title.rjust(SHARE_WIDTH) for title in columns)}
    widths = {bits for numbers in columns.values() for bits, number in numbers.items() if number}
    for bits in sorted(widths):
        shares = [100 * numbers[bits] / numbers.total() for numbers in columns.values()]
        cells = ["< 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %" for share in shares]
        name = "float" if bits == FLOAT_BITS else f"{bits} bit"
        rows[name] = "  ".join(cell.rjust(SHARE_WIDTH) for cell in cells)
    return rows


def describe_training(cfg: DictConfig, data: ImageData, trainer: Trainer) -> str:
    """Epochs, training steps of each, and images that no step of an epoch uses; warns where steps are few."""
    loader = data.train_dataloader()
    images = len(loader.sampler)  # type: ignore[arg-type]
    batches = len(loader)
    left_out = max(images - batches * data.settings.batch_size, 0) * trainer.world_size
    limit = cfg.trainer.limit_train_batches
    is_whole = limit == 1.0 and isinstance(limit, float)
    if not is_whole:
        batches = min(batches, int(limit if isinstance(limit, int) else limit * batches))
    steps = math.ceil(batches / cfg.trainer.accumulate_grad_batches)
    epochs = cfg.trainer.max_epochs
    said = f"{count(epochs, 'epoch')} x {count(steps, 'step')}"
    if left_out and is_whole:
        said += f", {left_out} of {images * trainer.world_size} images left out of each"
    is_short = is_whole and not cfg.trainer.fast_dev_run and steps * epochs < FEW_STEPS
    if is_short and data.settings.batch_size > 1:
        log.warning(
            "data.batch_size=%d: %s in all, which hardly train a model; smaller batches make more steps, as does trainer.max_epochs",
            data.settings.batch_size,
            count(steps * epochs, "training step"),
        )
    return said


def announce_run(
    cfg: DictConfig,
    recipe: QuantRecipe,
    data: ImageData,
    start: Start,
    module: QATModule,
    trainer: Trainer,
    lr: float,
) -> None:
    """Log what is trained, on what, from where and how; write `conversion.txt`."""
    optimizer = cfg.optimizer
    more = {
        "data": describe_data(data),
        "images": describe_images(
            data.settings, assumed_settings(cfg, cfg.data, start.source or start.net, data)
        ),
        "start": "; ".join(start.notes),
        "loss": ", ".join(module.loss.terms),
        "training": f"{describe_training(cfg, data, trainer)}, global batch {fit.global_batch(cfg, trainer)}, {optimizer.opt} "
        f"lr {lr:.3g}, weight decay {optimizer.weight_decay:g}, seed {cfg.seed}",
        "device": f"{describe_device(trainer)}, precision {trainer.precision}",
        "outputs": str(cfg.run_dir),
    }
    announce("training", start.net, cfg.model.name, recipe, data.input_size, **more)
    if not (cfg.trainer.fast_dev_run or trainer.checkpoint_callbacks):
        log.warning(
            "callbacks: none of them writes checkpoints, so this model will not be saved; callbacks=[default,...] does"
        )
    if recipe.name != "fp":
        log.info(conversion(start.net, Path(cfg.run_dir)))
        warn_of_random_weights(cfg, start)


def warn_of_random_weights(cfg: DictConfig, start: Start) -> None:
    """Warn of a quantized training that starts from random weights."""
    if start.is_random and not cfg.trainer.fast_dev_run:
        log.warning(
            "random weights: quantized training takes longer than in float, and when it is short, it ends less accurate from them; "
            "train with quant=fp first, then start from its checkpoint: ckpt=FP_RUN/checkpoints/best.ckpt"
        )


def announce_teacher(teacher: Teacher | None, data: ImageData, trainer: Trainer) -> float | None:
    """Evaluate the teacher once: a wrong teacher is the most expensive mistake of a distillation run.

    Returns:
        Its top-1 in percent if it is a float net, else None.
    """
    if teacher is None:
        return None
    device = trainer.strategy.root_device
    teacher.to(device)
    followed = evaluate(teacher, data.test_dataloader(), data.settings.num_classes, device)["top1"]
    top1, beside = followed, ""
    if teacher.is_one_of_two:
        top1 = evaluate(teacher.net, data.test_dataloader(), data.settings.num_classes, device)[
            "top1"
        ]
        beside = f", class head only; {top1:.2f} % with both heads"
    log.info("teacher: %s top-1 %.2f %%%s", data.evaluation_split, followed, beside)
    return top1 if conversion_of(teacher.net) is None else None
