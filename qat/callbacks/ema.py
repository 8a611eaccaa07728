"""Averaged weights: Lightning's callback, on the device of the run and without waiting for it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qat.utils.validate import check_int, check_number


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Exponential moving average of the weights; validation and checkpoints have the average.

    Lightning makes its copy before the module is moved, so that each step would copy all weights from the device, and torch asks the
    device in each step whether it is the first.

    Args:
        decay: weight of the old average in an update, 0 to 1.
        use_buffers: average buffers too, torch's way, which waits for the device; else they are copied.
        update_every_n_steps: optimizer steps between two updates.
        update_starting_at_step: first step of an update; None = the first.
        update_starting_at_epoch: from this epoch on also at the end of epochs; None = never there.

    Raises:
        UsageError: a decay or number of steps that cannot work.
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        use_buffers: bool = False,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        check_number("callbacks.ema.decay", decay, 0, highest=1)
        check_int("callbacks.ema.update_every_n_steps", update_every_n_steps, 1)
        super().__init__(None, use_buffers, decay, update_every_n_steps, update_starting_at_step, update_starting_at_epoch)
        self._update = get_ema_multi_avg_fn(decay)
        self._is_first = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights to where they are trained."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether an earlier stretch of the run, or the end of an epoch, has begun the average."""
        self._is_first = self._average_model is None or not self._average_model.n_averaged.item()

    on_train_epoch_start = on_train_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average after an optimizer step that is due."""
        average = self._average_model
        if average is None or self._use_buffers:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.global_step > self._latest_update_step and self.should_update(step_idx=trainer.global_step - 1):
            pairs = list(zip(average.module.parameters(), pl_module.parameters(), strict=True))
            copied = list(zip(average.module.buffers(), pl_module.buffers(), strict=True))
            with torch.no_grad():
                if not self._is_first and pairs:
                    self._update(*([one.detach() for one in side] for side in zip(*pairs, strict=True)), None)
                for old, new in chain(pairs if self._is_first else (), copied):
                    old.copy_(new)
                average.n_averaged += 1
            self._is_first, self._latest_update_step = False, trainer.global_step
