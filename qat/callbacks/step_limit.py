"""`trainer.max_steps`, for runs that go on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepLimit(Callback):
    """Ends a run behind so many optimizer steps, with a validation.

    Not Lightning's `Trainer(max_steps=...)`: with that a run that goes on behind an epoch trains on none of the next one's images, and
    one that ends within an epoch is judged by the validation before.

    Args:
        steps: optimizer steps of the whole run, from 1.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a run as it is that has them behind it."""
        trainer.should_stop |= trainer.global_step >= self.steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See whether that was the last step."""
        trainer.should_stop |= trainer.global_step >= self.steps
