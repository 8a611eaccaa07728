"""`last.ckpt`: where a run goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from qat.lit.csv_log import CSVLog
from qat.utils.validate import check_int

NAME = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` at the end of every epoch, and every n steps if asked.

    Lightning's ModelCheckpoint with a step interval leaves `last.ckpt` at the last multiple of it, short of the final weights.

    Its state is what a resumed run has of its table: the number of rows, and the row of the step or epoch that was complete, which
    Lightning writes behind the callbacks, when a kill may have come in between. Best checkpoints have none of it.

    Args:
        every_n_steps: also after every n optimizer steps; None = at the end of epochs only.
        dirpath: folder; None = set by whoever knows the run directory.

    Raises:
        UsageError: the interval is not a whole number from 1.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_int("checkpoint.every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._step, self._saved_at, self._waits, self._has_trained, self._stops = 0, -1, False, False, False
        self._rows: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take back what the table has from behind the checkpoint that is gone on from; a run that had stopped early stays stopped.

        Lightning forgets that at the start of every fit, and would train one epoch more each time.
        """
        stops = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        trainer.should_stop |= any(callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED for callback in stops)
        self._saved_at, self._waits, self._has_trained = -1, False, False
        if self._rows.get("count") is not None:
            for log in _row_logs(trainer):
                log.go_back(self._rows["count"], self._rows["coming"])
        self._rows = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning ends this run itself."""
        self._has_trained = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the step, to know whether this batch completes one, and whether the run was to stop before it."""
        self._step, self._stops = trainer.global_step, trainer.should_stop

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after a step that completes an interval; the last batch of an epoch is left to the end of the epoch.

        Between batches that are accumulated nothing is saved, and `max_time`, which looks behind every batch, waits: no file has their
        gradients.
        """
        if trainer.global_step == self._step:
            trainer.should_stop = self._stops
        if self.every_n_steps is None or trainer.global_step == self._step or trainer.is_last_batch:
            return
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was to be saved in front of it."""
        if self._waits:
            self._save(trainer, coming={})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save behind validation and behind the callbacks in front of this one, so that their state is in the file.

        Of an epoch that a limit of steps or of time has cut short, the file says that it is not over: with a later limit it goes on.
        """
        epochs: Any = trainer.fit_loop.epoch_progress
        counts, cut = (epochs.current, epochs.total), not trainer.is_last_batch
        for count in counts:
            count.processed -= cut
        self._save(trainer, coming=_coming_row(trainer))
        for count in counts:
            count.processed += cut

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run that was killed behind its last step: Lightning leaves out what ends it, as tables and averaged weights."""
        if self._has_trained or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        progress = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed  # type: ignore[attr-defined]  # the file was written in front of the end of its epoch
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ProgressBar):
                callback.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Rows of the table, while `last.ckpt` is written."""
        return self._rows

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember them for the start."""
        self._rows = dict(state_dict)

    def save(self, trainer: Trainer) -> Path | None:
        """Save behind a step, or behind the validation that follows it: Lightning takes that for done when it goes on from in front of it.

        Returns:
            The file, which is there before the next step; None where none is written.
        """
        if _validates_now(trainer):
            self._waits = True
        elif self._saved_at != trainer.global_step:
            self._save(trainer, coming=_coming_row(trainer) if trainer._logger_connector.should_update_logs else {})
        return self._path(trainer)

    def saved(self, trainer: Trainer) -> Path | None:
        """The file, if it is of the step that was the last."""
        return self._path(trainer) if self._saved_at == trainer.global_step else None

    def _path(self, trainer: Trainer) -> Path | None:
        return None if trainer.fast_dev_run or self.dirpath is None else Path(self.dirpath) / NAME  # type: ignore[attr-defined]

    def _save(self, trainer: Trainer, coming: dict[str, Any]) -> None:
        path, self._waits = self._path(trainer), False
        if path is None:
            return
        counts = [log.mark() for log in _row_logs(trainer)]
        self._rows = {"count": counts[0], "coming": coming} if counts else {}
        trainer.save_checkpoint(path)
        self._rows, self._saved_at = {}, trainer.global_step


def _row_logs(trainer: Trainer) -> list[CSVLog]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLog)]


def _coming_row(trainer: Trainer) -> dict[str, Any]:
    """What Lightning logs once the callbacks are through, as it does."""
    row: dict[str, Any] = convert_tensors_to_scalars(dict(trainer._logger_connector.metrics["log"]))
    return {"epoch": trainer.current_epoch, **row, "step": trainer.global_step - 1} if row else {}


def _validates_now(trainer: Trainer) -> bool:
    """True if Lightning validates behind the batch that was the last."""
    if not trainer.fit_loop.epoch_loop._should_check_val_epoch():
        return False
    if trainer.should_stop and trainer.fit_loop._can_stop_early:
        return True
    every = trainer.val_check_batch
    across_epochs = trainer.check_val_every_n_epoch is None
    number = trainer.fit_loop.total_batch_idx if across_epochs else trainer.fit_loop.batch_idx
    return isinstance(every, int) and (number + 1) % every == 0
