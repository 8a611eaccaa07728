"""Averaged weights: Lightning's callback, on the device of the run and without waiting for it."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qat.utils.validate import check_int, check_number


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Exponential moving average of the weights; validation and checkpoints have the average.

    Lightning makes its copy before the module is moved, so that each step would copy all weights from the device, updates them one by
    one, and asks the device in each step whether it is the first.

    Args:
        decay: weight of the old average in an update, 0 to below 1.
        update_every_n_steps: optimizer steps between updates.
        use_buffers: average buffers too; else they are copied.

    Raises:
        UsageError: with these values the average would stay what it was at first.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, *, use_buffers: bool = False
    ) -> None:
        check_number("callbacks.ema.decay", decay, 0, below=1)
        check_int("callbacks.ema.update_every_n_steps", update_every_n_steps, 1)
        self._decay = decay
        super().__init__(
            use_buffers=use_buffers, decay=decay, update_every_n_steps=update_every_n_steps
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights to where they are trained; count updates where nothing waits for the count, and update all in one operation."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = torch.tensor(0)
            self._average_model.multi_avg_fn = get_ema_multi_avg_fn(self._decay)
