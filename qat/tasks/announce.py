"""What a training says on the console before its first step, and of its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor

from qat.data import ImageData
from qat.lit import QATModule, Teacher
from qat.lit.accuracy import evaluate
from qat.model.start import Start
from qat.spec import QuantRecipe
from qat.tasks import fit, summary
from qat.tasks.teacher import is_float

log = logging.getLogger(__name__)

HEAD_GAP = 1.0  # points of top-1


def announce_run(cfg: DictConfig, recipe: QuantRecipe, data: ImageData, start: Start, module: QATModule, trainer: Trainer) -> None:
    """Log what is trained, on what, from where and how; write `conversion.txt`."""
    batch = fit.global_batch(cfg, trainer)
    optimizer = f"{cfg.optimizer.opt} {summary.describe_lr(cfg, batch)}, weight decay {cfg.optimizer.weight_decay:g}"
    entries = {
        "model": summary.describe_model(cfg.model.name, start.net, data.input_size),
        "recipe": summary.describe_recipe(recipe),
        "data": summary.describe_data(type(data).__name__.lower(), data),
        "start": "; ".join(start.notes),
        "loss": ", ".join(module.loss.terms),
        "training": f"{cfg.trainer.max_epochs} epochs, global batch {batch}, {optimizer}, seed {cfg.seed}",
        "device": f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}, precision {trainer.precision}",
        "outputs": str(cfg.run_dir),
    }
    log.info(summary.lines("qat: training", entries))
    if not (cfg.trainer.fast_dev_run or any(isinstance(c, Checkpointing) for c in trainer.callbacks)):  # type: ignore[attr-defined]
        log.warning("callbacks: none of them writes checkpoints, so no file will hold this net; callbacks=[default,...] has them")
    if recipe.name != "fp":
        log.info(summary.conversion(start.net, Path(cfg.run_dir)))


def announce_teacher(teacher: Teacher | None, data: ImageData, trainer: Trainer) -> float | None:
    """Evaluate the teacher once: a wrong teacher is the most expensive mistake of a distillation run.

    Returns:
        Its top-1 in percent if it is a float net, else None.
    """
    if teacher is None:
        return None
    device = trainer.strategy.root_device
    teacher.to(device)
    nets: list[Callable[[Tensor], Tensor]] = [teacher, teacher.net] if teacher.is_one_of_two else [teacher]
    followed, *whole = (evaluate(net, data.test_dataloader(), data.settings.num_classes, device)["top1"] for net in nets)
    own = whole[0] if whole else followed
    beside = f", its class head alone; {own:.2f} % with both heads" if whole else ""
    log.info("teacher: %s top-1 %.2f %%%s", data.evaluation_split, followed, beside)
    if own - followed > HEAD_GAP:
        log.warning("loss.teacher_head=cls: that head alone is %.1f points behind the net; mean follows both", own - followed)
    return own if is_float(teacher) else None


def announce_early_end(trainer: Trainer) -> None:
    """Say why a run is shorter than it was to be."""
    stops = [c for c in trainer.callbacks if isinstance(c, EarlyStopping) and c.stopping_reason_message]  # type: ignore[attr-defined]
    if not (trainer.should_stop and stops):
        return
    why = str(stops[0].stopping_reason_message).removesuffix(" Signaling Trainer to stop.").removesuffix(".")
    best = next((c.best_model_path for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path), "none")  # type: ignore[attr-defined]
    epochs = f"{trainer.current_epoch} of {trainer.max_epochs} epochs"
    log.info("stopped early at step %d, behind %s: %s; best checkpoint: %s", trainer.global_step, epochs, why, best)
