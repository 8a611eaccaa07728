"""Lightning's throughput monitor, told how to count a batch of (images, targets), and how long the loop waits for one."""

from __future__ import annotations

import time
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage

from qat.callbacks.waiting import WaitClock

WAIT_SHARE = "throughput/data_wait_share"


def _images(batch: Any) -> int:
    return len(batch[0])


class Throughput(ThroughputMonitor):
    """Images per second in the logs, and the share of time that training waits for its loader.

    `throughput/data_wait_share` is between 0 and 1, of the time since the last log. Validations are left out of both. The share is that of
    the process that logs. Unlike Lightning's own, no step waits for the device: over a window of steps the host's clock says the same, as
    it cannot run ahead by more than the queue of launches.

    Args:
        window_size: steps over which the rate is averaged.
    """

    def __init__(self, window_size: int = 100) -> None:
        super().__init__(batch_size_fn=_images, window_size=window_size)
        self._clock = WaitClock()

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Count from here."""
        super().on_train_start(trainer, *args)
        self._clock.restart(trainer)

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        """Leave the validation out."""
        super().on_validation_start(trainer, *args)
        self._clock.pause()

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        """Go on with training."""
        super().on_validation_end(trainer, *args)
        self._clock.go_on()

    def _update(self, trainer: Trainer, pl_module: LightningModule, batch: Any, iter_num: int) -> None:
        """Lightning's, without its `torch.cuda.synchronize` in each step and without FLOPs."""
        stage = cast(RunningStage, trainer.state.stage)
        self._samples[stage] += self.batch_size_fn(batch)
        self._batches[stage] += 1
        elapsed = time.perf_counter() - self._t0s[stage]
        self._throughputs[stage].update(time=elapsed, batches=self._batches[stage], samples=self._samples[stage])

    def _compute(self, trainer: Trainer, iter_num: int | None = None) -> None:
        """Lightning's, with the wait in the same row."""
        connector = trainer._logger_connector
        if not connector.should_update_logs:
            return
        stage = cast(RunningStage, trainer.state.stage)
        throughput = self._throughputs[stage]
        metrics: dict[str, Any] = {f"{stage.value}{throughput.separator}{name}": value for name, value in throughput.compute().items()}
        if stage is RunningStage.TRAINING:
            metrics |= self._wait(trainer)
        connector.log_metrics(metrics, step=iter_num)

    def _wait(self, trainer: Trainer) -> dict[str, float]:
        found = self._clock.read(trainer)
        self._clock.restart(trainer)
        return {} if found is None else {WAIT_SHARE: found[1]}
