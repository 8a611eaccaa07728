"""What a run says on the console: its first lines, its quantized layers in short, its teacher."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from omegaconf import DictConfig
from torch import nn

from qat.data import ImageData
from qat.lit import QATModule, Teacher, scaled_lr
from qat.lit.accuracy import evaluate
from qat.model.convert import ConversionReport, conversion_of, conversion_report
from qat.model.frozen import FrozenWeight
from qat.model.ptq_spec import PtqRecipe
from qat.model.start import Start
from qat.spec import QuantRecipe
from qat.utils.files import write_text

log = logging.getLogger(__name__)


def lines(title: str, entries: dict[str, str]) -> str:
    """A title and aligned `key  value` lines."""
    width = max(len(key) for key in entries)
    return "\n".join([title, *(f"  {key.ljust(width)}  {value}" for key, value in entries.items())])


def describe_model(name: str, net: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Name, parameters (those that are integer codes among them) and size of the images."""
    params = sum(p.numel() for p in net.parameters()) + sum(m.stored.numel() for m in net.modules() if isinstance(m, FrozenWeight))
    chans, height, width = input_size
    return f"{name}, {params / 1e6:.2f} M parameters, images {chans} x {height} x {width}"


def describe_recipe(recipe: QuantRecipe) -> str:
    """One line of bits and quantizers."""
    if recipe.name == "fp":
        return "fp: float, nothing is quantized"
    rules = f", {len(recipe.overrides)} override(s)" if recipe.overrides else ""
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


def describe_data(name: str, data: ImageData) -> str:
    """Sizes of the splits."""
    counts = ", ".join(f"{len(data.split(s))} {s}" for s in data.splits)
    return f"{name}: {counts} images, {data.settings.num_classes} classes"


def conversion(net: nn.Module, folder: Path) -> str:
    """Write `conversion.txt`, the report of a net, into a folder; gives it as `compact` does."""
    report = conversion_report(net)
    write_text(folder / "conversion.txt", report.to_text() + "\n")
    return compact(report)


def compact(report: ConversionReport) -> str:
    """The conversion report with equal blocks in one row: numbers in names become `*`, the last column counts them."""
    rows = Counter((re.sub(r"\d+", "*", r.module), *(str(v) for v in dataclasses.astuple(r)[1:])) for r in report.rows)
    head = ("module", "role", "quantizer", "bits", "axis", "scales", "offsets", "times")
    table = [head, *((*row, str(times)) for row, times in rows.items())]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    text = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    floats = Counter((re.sub(r"\d+", "*", name), cls) for name, cls in report.stays_float)
    stays = ", ".join(f"{name} ({cls})" + (f" x{n}" if n > 1 else "") for (name, cls), n in floats.items())
    return "\n".join(["quantized", *text, f"  stays float: {stays}"])


def announce_run(cfg: DictConfig, recipe: QuantRecipe, data: ImageData, start: Start, module: QATModule, trainer: Trainer) -> None:
    """Log what is trained, on what, from where and how; write `conversion.txt`."""
    batch, optimizer = cfg.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches, cfg.optimizer
    lr = scaled_lr(
        optimizer.lr,
        global_batch=batch,
        lr_base_batch=optimizer.get("lr_base_batch"),
        lr_batch_rule=optimizer.get("lr_batch_rule", "linear"),
    )
    entries = {
        "model": describe_model(cfg.model.name, start.net, data.input_size),
        "recipe": describe_recipe(recipe),
        "data": describe_data(type(data).__name__.lower(), data),
        "start": "; ".join(start.notes),
        "loss": ", ".join(module.loss.terms),
        "training": f"{cfg.trainer.max_epochs} epochs, global batch {batch}, {optimizer.opt} lr {lr:.3g}, "
        f"weight decay {optimizer.weight_decay:g}, seed {cfg.seed}",
        "device": f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}, precision {trainer.precision}",
        "outputs": str(cfg.run_dir),
    }
    log.info(lines("qat: training", entries))
    if not (cfg.trainer.fast_dev_run or any(isinstance(c, Checkpointing) for c in trainer.callbacks)):  # type: ignore[attr-defined]
        log.warning("callbacks: none of them writes checkpoints, so no file will hold this net; callbacks=[default,...] has them")
    if recipe.name != "fp":
        log.info(conversion(start.net, Path(cfg.run_dir)))


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
        top1 = evaluate(teacher.net, data.test_dataloader(), data.settings.num_classes, device)["top1"]
        beside = f", its class head alone; {top1:.2f} % with both heads"
    log.info("teacher: %s top-1 %.2f %%%s", data.evaluation_split, followed, beside)
    return top1 if conversion_of(teacher.net) is None else None
