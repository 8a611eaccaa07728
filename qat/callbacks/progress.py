"""Callbacks for progress: seeds, CUDA graphs, the last step, and a log line per epoch."""

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
    """Seeds every step (dropout, drop path), so that a resumed run draws the same numbers.

    Checkpoints therefore need no generator state.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators of this process."""
        seed_step(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)


class GraphSteps(Callback):
    """Marks the start of each step for CUDA graphs, and frees gradients in the graphs' memory."""

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin a step."""
        torch.compiler.cudagraph_mark_step_begin()

    on_validation_batch_start = on_train_batch_start
    on_test_batch_start = on_train_batch_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Free the gradients, which are in the CUDA graph's memory.

        With gradient accumulation, copy them out of this memory instead.
        """
        accumulates = trainer.accumulate_grad_batches > 1
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone() if accumulates else None


class StepLimit(Callback):
    """Ends a run after `trainer.max_steps` optimizer steps, with a validation if its epoch has one.

    With `Trainer(max_steps=...)`, a run that is resumed at the end of an epoch would skip the
    images of the next epoch, and a run that ends within an epoch would not validate its final
    weights.

    Args:
        steps: optimizer steps of the whole run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Stop a resumed run that has already taken all steps."""
        trainer.should_stop |= trainer.global_step >= self.steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop after the last step."""
        if trainer.global_step >= self.steps and not trainer.should_stop:
            log.info("trainer.max_steps=%d is reached", self.steps)
            trainer.should_stop = True


class EpochLog(Callback):
    """Logs loss, val accuracy if any, learning rate, images/s and time left after every epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()
        self._first_step = trainer.global_step
        self._images = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += len(batch[0]) * trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line of the epoch."""
        # Reading the metrics gathers values, so all processes must do it.
        metrics = trainer.callback_metrics
        if not trainer.is_global_zero:
            return
        epoch = trainer.current_epoch + 1
        formats = {"train/loss": "loss {:.4g}"}
        if epoch % (trainer.check_val_every_n_epoch or 1) == 0:
            formats["val/top1"] = "val accuracy {:.2f} %"
        values = [text.format(metrics[key]) for key, text in formats.items() if key in metrics]
        param_group = trainer.optimizers[0].param_groups[0]
        seconds = time.monotonic() - self._start
        last_step = trainer.global_step / epoch * (trainer.max_epochs or 0)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepLimit):
                last_step = min(last_step, callback.steps)
        seconds_per_step = seconds / max(trainer.global_step - self._first_step, 1)
        seconds_left = round(seconds_per_step * max(last_step - trainer.global_step, 0))
        log.info(
            "epoch %d/%d  %s  lr %.2e  %.0f img/s  left %s",
            epoch,
            trainer.max_epochs,
            "  ".join(values),
            param_group["lr"] / param_group.get("lr_scale", 1.0),
            self._images / seconds,
            datetime.timedelta(seconds=seconds_left),
        )
