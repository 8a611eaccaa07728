"""`last.ckpt`: where a run goes on after a kill."""

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

NAME = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` at the end of every epoch, and every n steps if asked; has a resumed run go on where it was.

    Lightning's ModelCheckpoint with a step interval leaves `last.ckpt` at the last multiple of it, short of the final weights.

    Args:
        every_n_steps: also after every n optimizer steps; None = at the end of epochs only.
        dirpath: folder; None = no file is written.

    Attributes:
        earlier_seconds: of training before the checkpoint that the run was resumed from.

    Raises:
        UsageError: the interval is not an integer of at least 1.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_int("checkpoint.every_n_steps", every_n_steps, 1)
        self.every_n_steps, self.dirpath = every_n_steps, dirpath
        self.earlier_seconds = 0.0
        self._began: float | None = None
        self._step, self._saved_at, self._waits, self._stops = 0, -1, False, False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the record of the best checkpoint, also of a run that was moved to another directory, but not of a file that is gone."""
        states = checkpoint.get("callbacks", {})
        for best in [
            one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)
        ]:
            state = states.pop(best.state_key, None)
            if not state:
                continue
            folder = Path(best.dirpath or "")
            paths = {
                key: str(folder / Path(path).name) if path else ""
                for key, path in state.items()
                if key.endswith("_path")
            }
            if paths["best_model_path"] and not Path(paths["best_model_path"]).is_file():
                log.warning(
                    "resume: %s is missing; the best epoch is chosen from the epochs that follow",
                    paths["best_model_path"],
                )
                continue
            scores = {
                str(folder / Path(path).name): score
                for path, score in state["best_k_models"].items()
            }
            states[best.state_key] = {
                **state,
                **paths,
                "best_k_models": scores,
                "dirpath": best.dirpath,
            }
        for stop in trainer.early_stopping_callbacks:
            if state := states.get(stop.state_key):
                state["patience"] = stop.patience

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that had stopped early stays stopped: Lightning forgets it at every start, and would train one epoch more each time.

        Not where it has more patience now.
        """
        goes_on = EarlyStoppingReason.NOT_STOPPED, EarlyStoppingReason.PATIENCE_EXHAUSTED
        stops = trainer.early_stopping_callbacks
        trainer.should_stop |= any(
            stop.wait_count >= stop.patience or stop.stopping_reason not in goes_on
            for stop in stops
        )
        self._began, self._saved_at, self._waits = None, -1, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, to know whether this batch completes one, and whether the run was to stop before it."""
        self._step, self._stops = trainer.global_step, trainer.should_stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step that completes an interval; after the last batch of an epoch its end does.

        Between batches that are accumulated nothing is saved, and `max_time`, which looks after every batch, waits: no file has their
        gradients.
        """
        if trainer.global_step == self._step:
            trainer.should_stop = self._stops
        elif (
            self.every_n_steps is not None
            and trainer.global_step % self.every_n_steps == 0
            and not trainer.is_last_batch
        ):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was to be saved before it."""
        if self._waits:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the validation and after the callbacks before this one, so that their state is in the file.

        Of an epoch that a limit of steps or of time has cut short, the file says that it is not over: with a later limit it goes on.
        """
        log_before_saving(trainer, epoch=True)
        epochs: Any = trainer.fit_loop.epoch_progress
        cut = not trainer.is_last_batch
        for count in (epochs.current, epochs.total):
            count.processed -= cut
        self._save(trainer)
        for count in (epochs.current, epochs.total):
            count.processed += cut

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run that was killed after its last step: Lightning leaves out what ends it, as tables and averaged weights."""
        if self._began is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        progress = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed  # type: ignore[attr-defined]  # the file was written before the end of its epoch
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ProgressBar):
                callback.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        return {
            "seconds": self.earlier_seconds
            + (0.0 if self._began is None else time.monotonic() - self._began)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from them."""
        self.earlier_seconds = float(state_dict.get("seconds", 0.0))

    def save(self, trainer: Trainer) -> None:
        """Save after a step, or after the validation that follows it: Lightning takes that for done when it goes on from before it."""
        loops = trainer.fit_loop
        if loops.epoch_loop._should_check_val_fx(loops._data_fetcher):  # type: ignore[arg-type]
            self._waits = True
        elif self._saved_at != trainer.global_step:
            log_before_saving(trainer, epoch=False)
            self._save(trainer)

    def saved(self, trainer: Trainer) -> Path | None:
        """The file, if it is of the step that was the last."""
        return self._path(trainer) if self._saved_at == trainer.global_step else None

    def _path(self, trainer: Trainer) -> Path | None:
        return None if trainer.fast_dev_run or self.dirpath is None else Path(self.dirpath) / NAME  # type: ignore[attr-defined]

    def _save(self, trainer: Trainer) -> None:
        path, self._waits = self._path(trainer), False
        if path is not None:
            trainer.save_checkpoint(path)
            self._saved_at = trainer.global_step


class BestCheckpoints(ModelCheckpoint):
    """Several best checkpoints beside `best.ckpt`: a class of its own, since Lightning keeps one state for each class and score."""
