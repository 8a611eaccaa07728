"""How a training proceeds: what its steps draw, which is its last, and a line an epoch."""

from __future__ import annotations

import datetime
import logging
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qat.data.sampler import seed_step

log = logging.getLogger(__name__)


class StepSeed(Callback):
    """Seeds every step (dropout, drop path), so that a resumed run draws what an uninterrupted one draws; no generator's state is saved.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators of this process."""
        seed_step(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)


class GraphSteps(Callback):
    """Tells CUDA graphs of compiled nets where each step begins, and takes gradients out of their memory where it ends."""

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin a step."""
        torch.compiler.cudagraph_mark_step_begin()

    on_validation_batch_start = on_test_batch_start = on_train_batch_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Nothing reads gradients after a step, but the next one where batches accumulate, which adds to them: a copy."""
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad = (
                    parameter.grad.clone() if trainer.accumulate_grad_batches > 1 else None
                )


class StepLimit(Callback):
    """Ends a run after `trainer.max_steps` optimizer steps, with a validation.

    With `Trainer(max_steps=...)` itself a run that is resumed at the end of an epoch skips the next one's images, and a run that ends
    within an epoch has no score of its last weights.

    Args:
        steps: optimizer steps of the whole run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Leave a run as it is that has taken them all."""
        trainer.should_stop |= trainer.global_step >= self.steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """See whether that was the last step."""
        if trainer.global_step >= self.steps and not trainer.should_stop:
            log.info("trainer.max_steps=%d is reached", self.steps)
            trainer.should_stop = True


class EpochLog(Callback):
    """Logs loss, validation accuracy, learning rate, images per second and the time left after every epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when the first epoch began."""
        self._start, self._first_epoch, self._images = time.monotonic(), trainer.current_epoch, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += len(batch[0]) * trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        metrics = trainer.callback_metrics  # gathered from all processes: all of them have to ask
        if not trainer.is_global_zero:
            return
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = time.monotonic() - self._start
        shown = {"train/loss": "loss {:.4g}"}
        if done % (trainer.check_val_every_n_epoch or 1) == 0:
            shown["val/top1"] = "val accuracy {:.2f} %"
        values = [text.format(metrics[key]) for key, text in shown.items() if key in metrics]
        group = trainer.optimizers[0].param_groups[0]
        rate = group["lr"] / group.get("lr_scale", 1.0)
        left = datetime.timedelta(
            seconds=round(seconds / (done - self._first_epoch) * max(total - done, 0))
        )
        log.info(
            "epoch %d/%d  %s  lr %.2e  %.0f img/s  left %s",
            done,
            total,
            "  ".join(values),
            rate,
            self._images / seconds,
            left,
        )
