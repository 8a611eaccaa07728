"""Write `last.ckpt`, from which a killed run resumes."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from qat.lit.loggers import log_before_saving
from qat.utils.validate import check_int

log = logging.getLogger(__name__)

FILE_NAME = "last.ckpt"
# Reasons after which a resumed run trains on, unless its patience is still exhausted.
_CONTINUING_REASONS = (EarlyStoppingReason.NOT_STOPPED, EarlyStoppingReason.PATIENCE_EXHAUSTED)


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` at the end of every epoch and every n steps, and helps to resume from it.

    Lightning's ModelCheckpoint with an interval of steps would leave `last.ckpt` at the last
    multiple of the interval, not at the final weights.

    Args:
        every_n_steps: optimizer steps between two saves, in addition to those at the end of every
            epoch; None = save only at the end of epochs.
        dirpath: folder; None = no file is written.

    Attributes:
        earlier_seconds: training time before the checkpoint from which the run was resumed.

    Raises:
        UsageError: the interval is not an integer of at least 1.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_int("checkpoint.every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self.earlier_seconds = 0.0
        self._start_time: float | None = None  # on the monotonic clock
        self._step_before_batch = 0  # optimizer steps before the current batch
        self._should_stop_before_batch = False  # `should_stop` before the current batch
        self._saved_step = -1  # optimizer step at which the file was last written
        self._waits_for_validation = False  # True while a save waits for the end of a validation

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the records of best checkpoints, and set `patience` to its current setting.

        The run may have moved to another directory. If the best file of a callback is missing, the
        callback's record is dropped.
        """
        states = checkpoint.get("callbacks", {})
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint):
                continue
            state = states.pop(callback.state_key, None)
            if not state:
                continue
            moved_state = _move_state(state, Path(callback.dirpath or ""))
            best_path = moved_state["best_model_path"]
            if best_path and not Path(best_path).is_file():
                log.warning(
                    "resume: %s is missing; the best epoch is chosen from the epochs that follow",
                    best_path,
                )
                continue
            states[callback.state_key] = {**moved_state, "dirpath": callback.dirpath}
        for stopping in trainer.early_stopping_callbacks:
            state = states.get(stopping.state_key)
            if state:
                state["patience"] = stopping.patience

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not continue a run that had stopped early, unless a raised patience allows it.

        Lightning does not restore `should_stop`, and would train another epoch each time.
        """
        for stopping in trainer.early_stopping_callbacks:
            # With a patience of 0, the first validation without improvement stops the run.
            has_no_patience = stopping.wait_count >= max(stopping.patience, 1)
            trainer.should_stop |= (
                has_no_patience or stopping.stopping_reason not in _CONTINUING_REASONS
            )
        self._start_time = None
        self._saved_step = -1
        self._waits_for_validation = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start_time = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Store the step and `should_stop` for use after the batch."""
        self._step_before_batch = trainer.global_step
        self._should_stop_before_batch = trainer.should_stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step that completes an interval, except at the end of an epoch.

        Between accumulated batches, nothing is saved, because no file contains their gradients. For
        the same reason, `max_time`, which Lightning checks after every batch, does not stop the run
        there.
        """
        if trainer.global_step == self._step_before_batch:
            trainer.should_stop = self._should_stop_before_batch
            return
        if self.every_n_steps is None or trainer.is_last_batch:
            return
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save now if `save` has waited for the validation."""
        if self._waits_for_validation:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the validation and the callbacks before this one, to include their state.

        If the epoch was cut short, for example by a limit of steps, the file records the epoch as
        unfinished, and a resumed run that trains on continues it.
        """
        log_before_saving(trainer, is_epoch_end=True)
        epochs: Any = trainer.fit_loop.epoch_progress
        num_unfinished = 0 if trainer.is_last_batch else 1
        for progress in (epochs.current, epochs.total):
            progress.processed -= num_unfinished
        self._save(trainer)
        for progress in (epochs.current, epochs.total):
            progress.processed += num_unfinished

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete a resumed run that was killed after its last step.

        Lightning would not call `on_train_end` of the callbacks, and tables and averaged weights
        would be missing.
        """
        # If there is a start time, Lightning has trained, and has called `on_train_end` itself.
        if self._start_time is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # The checkpoint was written before Lightning counted its epoch as completed, so count it.
        progress = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ProgressBar):
                callback.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        seconds = 0.0 if self._start_time is None else time.monotonic() - self._start_time
        return {"seconds": self.earlier_seconds + seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds of earlier training."""
        self.earlier_seconds = float(state_dict.get("seconds", 0.0))

    def save(self, trainer: Trainer) -> None:
        """Save after a step if not yet done, or after the validation if one follows.

        A run that resumes from a file written before the validation would skip the validation.
        """
        fit_loop = trainer.fit_loop
        if fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher):  # type: ignore[arg-type]
            self._waits_for_validation = True
        elif self._saved_step != trainer.global_step:
            log_before_saving(trainer, is_epoch_end=False)
            self._save(trainer)

    def final_file(self, trainer: Trainer) -> Path | None:
        """Return the path of the file if it was written after the last step, else None."""
        return self._path(trainer) if self._saved_step == trainer.global_step else None

    def _path(self, trainer: Trainer) -> Path | None:
        if trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return None
        return Path(self.dirpath) / FILE_NAME

    def _save(self, trainer: Trainer) -> None:
        self._waits_for_validation = False
        path = self._path(trainer)
        if path is not None:
            trainer.save_checkpoint(path)
            self._saved_step = trainer.global_step


def _move_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a ModelCheckpoint's state, with its files' paths in another folder."""
    moved_state = dict(state)
    for key, path in state.items():
        if key.endswith("_path"):
            moved_state[key] = str(folder / Path(path).name) if path else ""
    moved_state["best_k_models"] = {
        str(folder / Path(path).name): score for path, score in state["best_k_models"].items()
    }
    return moved_state


class BestCheckpoints(ModelCheckpoint):
    """Several best checkpoints, in addition to `best.ckpt`.

    This class is separate because Lightning stores one state for each class and score.
    """
