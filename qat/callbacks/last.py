"""`last.ckpt`: where a run goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from qat.spec import check_whole

NAME = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` at the end of every epoch, and every n steps if asked.

    Lightning's ModelCheckpoint with a step interval leaves `last.ckpt` at the last multiple of it, short of the final weights.

    Args:
        every_n_steps: also after every n optimizer steps; None = at the end of epochs only.
        dirpath: folder; None = set by whoever knows the run directory.

    Raises:
        UsageError: the interval is not a whole number from 1.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_whole("checkpoint.every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._saved_at = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after a step that completes an interval; the last batch of an epoch is left to the end of the epoch."""
        step = trainer.global_step
        due = self.every_n_steps is not None and step and step % self.every_n_steps == 0 and step != self._saved_at
        if due and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save behind validation and behind the callbacks in front of this one, so that their state is in the file."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(Path(self.dirpath) / NAME)
