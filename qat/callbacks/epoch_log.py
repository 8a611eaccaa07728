"""One line an epoch for logs without a terminal: what a person watches from a SLURM log or a pipe."""

from __future__ import annotations

import datetime
import logging
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qat.callbacks.waiting import WaitClock, advice
from qat.data import ImageData
from qat.data.arrays import ImageArrays

log = logging.getLogger(__name__)

# Less is nothing that loader processes are worth.
WAIT_SHARE, WAIT_S = 0.2, 1.0
# By then compilers and caches are warm, and a short run is over.
FORECAST_S = 60.0


def images_left_out(trainer: Trainer) -> str:
    """How many images could not be decoded so far, in words; empty where all could."""
    data = getattr(trainer, "datamodule", None)
    count = data.left_out() if isinstance(data, ImageData) else {}
    return f"left out {', '.join(f'{n} {split}' for split, n in count.items())} images" if count else ""


def _in_memory(trainer: Trainer) -> bool:
    """True where no image is left to decode: processes that cut arrays are seldom worth their start."""
    data = getattr(trainer, "datamodule", None)
    return isinstance(data, ImageData) and isinstance(data.split("train"), ImageArrays)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


class EpochLog(Callback):
    """Logs loss, validation accuracy, learning rate, throughput and time left after every epoch.

    A minute into the first epoch it says how long the whole run will take.
    Where an epoch has waited for its loader for more than a second and a fifth of its time, validation left out, it says that, and what to
    try: of several processes, for the one that waited longest.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._first_epoch = 0
        self._images = self._batches = 0
        self._forecast = self._validated = False
        self._clock = WaitClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when the first epoch began."""
        self._start, self._first_epoch = time.monotonic(), trainer.current_epoch
        self._images, self._batches, self._forecast = 0, 0, False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the loader's part of this epoch; it has no accuracy yet."""
        self._clock.restart(trainer)
        self._validated = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out of that."""
        self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with training."""
        self._clock.go_on()
        self._validated = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: tuple, batch_idx: int) -> None:
        """Count images; a minute into a run say how long it will take."""
        self._images += len(batch[0]) * trainer.world_size
        self._batches += 1
        seconds = time.monotonic() - self._start
        if seconds < FORECAST_S or self._forecast:
            return
        self._forecast = True
        epochs = (trainer.max_epochs or 0) - self._first_epoch
        if trainer.is_global_zero and trainer.current_epoch == self._first_epoch and epochs > 0:
            epoch = seconds / self._batches * float(trainer.num_training_batches)
            rate = f"{self._images / seconds:.0f} img/s"
            log.info("%s: about %s of training an epoch, %s for %d epochs", rate, _duration(epoch), _duration(epoch * epochs), epochs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        waiting = self._waiting(trainer)
        if not trainer.is_global_zero:
            return
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = time.monotonic() - self._start
        metrics = trainer.callback_metrics
        shown = {"loss": "train/loss"} | ({"val top1": "val/top1"} if self._validated else {})  # else it is of an earlier epoch
        values = [f"{label} {metrics[key]:.4g}" for label, key in shown.items() if key in metrics]
        if left_out := images_left_out(trainer):
            values.append(left_out)
        group = trainer.optimizers[0].param_groups[0] if trainer.optimizers else {"lr": 0.0}
        rate = group["lr"] / group.get("lr_scale", 1.0)
        left = _duration(seconds / (done - self._first_epoch) * max(total - done, 0))
        speed = f"{self._images / seconds:.0f} img/s{waiting}"
        log.info("epoch %d/%d  %s  lr %.2e  %s  left %s", done, total, "  ".join(values), rate, speed, left)

    def _waiting(self, trainer: Trainer) -> str:
        """The wait for data in words, empty where it is short. All processes of a run have to ask."""
        found = self._clock.read(trainer)
        if found is None:
            return ""
        times = torch.tensor(found, device=trainer.strategy.root_device)
        waited, share = (trainer.strategy.reduce(times, reduce_op="max") if trainer.world_size > 1 else times).tolist()
        if waited < WAIT_S or share < WAIT_SHARE or _in_memory(trainer):
            return ""
        workers = getattr(trainer.train_dataloader, "num_workers", 0)
        return f"  waiting for data {share:.0%} of the time: {advice(share, workers, trainer.num_devices)}".replace("%", " %", 1)
