"""Lightning's weight averaging, made faster: averages are updated on the training device."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qat.utils.validate import check_int, check_number


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Exponential moving average of the weights, for validation and checkpoints.

    Lightning's own callback copies the module before the module is moved, so that each update
    copies all weights from the device. Lightning also updates weights one by one, and reads from
    the device whether an update is the first.

    Args:
        decay: weight of the old average in an update, 0 to below 1.
        update_every_n_steps: optimizer steps between updates.
        use_buffers: True = average buffers too; False = copy them.

    Raises:
        UsageError: the decay is not from 0 to below 1, or the interval is not an integer of at
            least 1.
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
        """Copy the weights to the training device, where one operation updates all of them."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # The counter is on the CPU, so that reading it does not wait for the device.
            self._average_model.n_averaged = torch.tensor(0)
            self._average_model.multi_avg_fn = get_ema_multi_avg_fn(self._decay)
