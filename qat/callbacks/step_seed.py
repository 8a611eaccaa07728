"""What a training step draws (dropout, drop path) is a function of (seed, batch number, process)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qat.data.sampler import seed_step


class StepSeed(Callback):
    """Seeds every step, so that a resumed run draws what an uninterrupted one draws; no generator's state needs saving.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators of this process."""
        seed_step(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)
