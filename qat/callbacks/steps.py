"""What a training step draws is a function of (seed, batch number, process); and the last step of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qat.data.sampler import seed_step


class StepSeed(Callback):
    """Seeds every step (dropout, drop path), so that a resumed run draws what an uninterrupted one draws; no generator's state is saved.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators of this process."""
        seed_step(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)


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
        trainer.should_stop |= trainer.global_step >= self.steps
