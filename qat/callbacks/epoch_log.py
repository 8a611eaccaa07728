"""One line an epoch for logs without a terminal: what a person watches from a SLURM log or a pipe."""

from __future__ import annotations

import datetime
import logging
import time

from lightning.pytorch import Callback, LightningModule, Trainer

from qat.data import ImageData

log = logging.getLogger(__name__)


def images_left_out(trainer: Trainer) -> str:
    """How many images could not be decoded so far, in words; empty where all could."""
    data = getattr(trainer, "datamodule", None)
    count = data.left_out() if isinstance(data, ImageData) else {}
    return f"left out {', '.join(f'{n} {split}' for split, n in count.items())} images" if count else ""


class EpochLog(Callback):
    """Logs loss, validation accuracy, learning rate, throughput and time left after every epoch."""

    def __init__(self) -> None:
        self._start = 0.0
        self._first_epoch = 0
        self._images = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when the first epoch began."""
        self._start, self._first_epoch = time.monotonic(), trainer.current_epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: tuple, batch_idx: int) -> None:
        """Count images."""
        self._images += len(batch[0]) * trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        if not trainer.is_global_zero:
            return
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = time.monotonic() - self._start
        metrics = trainer.callback_metrics
        values = [f"{label} {metrics[key]:.4g}" for label, key in (("loss", "train/loss"), ("val top1", "val/top1")) if key in metrics]
        if left_out := images_left_out(trainer):
            values.append(left_out)
        group = trainer.optimizers[0].param_groups[0] if trainer.optimizers else {"lr": 0.0}
        rate = group["lr"] / group.get("lr_scale", 1.0)
        left = datetime.timedelta(seconds=round(seconds / (done - self._first_epoch) * max(total - done, 0)))
        log.info("epoch %d/%d  %s  lr %.2e  %.0f img/s  left %s", done, total, "  ".join(values), rate, self._images / seconds, left)
