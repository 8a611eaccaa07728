"""One line an epoch: what a person watches in a log without a terminal."""

from __future__ import annotations

import datetime
import logging
import time

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class EpochLog(Callback):
    """Logs loss, validation accuracy, learning rate, images per second and the time left after every epoch."""

    def __init__(self) -> None:
        self._start, self._first_epoch, self._images, self._validated = 0.0, 0, 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when the first epoch began."""
        self._start, self._first_epoch, self._images = time.monotonic(), trainer.current_epoch, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """This epoch has no accuracy yet."""
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now it has."""
        self._validated = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: tuple, batch_idx: int) -> None:
        """Count images."""
        self._images += len(batch[0]) * trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        metrics = trainer.callback_metrics  # gathered from all processes: all of them have to ask
        if not trainer.is_global_zero:
            return
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = time.monotonic() - self._start
        shown = {"loss": "train/loss"} | ({"val top1": "val/top1"} if self._validated else {})
        values = [f"{label} {metrics[key]:.4g}" for label, key in shown.items() if key in metrics]
        group = trainer.optimizers[0].param_groups[0] if trainer.optimizers else {"lr": 0.0}
        rate = group["lr"] / group.get("lr_scale", 1.0)
        left = datetime.timedelta(seconds=round(seconds / (done - self._first_epoch) * max(total - done, 0)))
        log.info("epoch %d/%d  %s  lr %.2e  %.0f img/s  left %s", done, total, "  ".join(values), rate, self._images / seconds, left)
