"""After a signal, save and stop a run after the same step in all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from qat.callbacks.last import LastCheckpoint
from qat.launch import signals
from qat.launch.signals import Preempted


class Preemption(Checkpoint):
    """Writes `last.ckpt` and raises `Preempted` if a signal of `qat.launch.signals` has arrived.

    Processes may notice a signal in different steps, and no process may stop on its own, because
    the others would wait for its gradients. After each step, all processes start an exchange of
    signals on the host, and read the result of the previous exchange. So all processes stop after
    the same step, at most one step later, without waiting for the device. After a signal during a
    validation, or in the last step before one, the run stops after the validation.

    This class is a `Checkpoint` only so that Lightning calls it after all other callbacks, whose
    state the file contains. It must come after `LastCheckpoint`, which writes the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._group: Any = None
        self._exchange_running: tuple[dist.Work, Tensor] | None = None
        self._signal = 0
        self._checked_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, delay the reaction to signals until the end of a step."""
        signals.defer(on=True)
        # Replace Lightning's new handlers, which would requeue the job from their own file.
        signals.listen()
        self._exchange_running = None
        self._signal = 0
        self._checked_step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            _end_exchange_of_lightning(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check for signals after an optimizer step, and save; the end of an epoch saves anyway."""
        if trainer.global_step == self._checked_step or self._signal:
            return
        self._checked_step = trainer.global_step
        self._signal = self._exchange()
        if self._signal and not trainer.is_last_batch:
            last = _writer(trainer)
            if last is not None:
                last.save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before the next step, after the metrics of the last step were logged."""
        self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after an epoch that `LastCheckpoint` has saved and whose metrics were logged."""
        self._stop_if_any(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the evaluation; from now on, a signal raises `Preempted` immediately."""
        self._stop_if_any(trainer)
        signals.defer(on=False)

    def _stop_if_any(self, trainer: Trainer) -> None:
        """Stop if a signal has arrived in any process; the processes wait for each other."""
        if not self._signal:
            self._signal = max(self._exchange(), self._exchange(wait=True))
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if not self._signal:
            return
        signals.forget()
        signals.defer(on=True)  # so that later signals do not interrupt the end of the run
        last = _writer(trainer)
        saved = None if last is None else last.saved(trainer)
        raise Preempted(self._signal, trainer.global_step, saved)

    def _exchange(self, *, wait: bool = False) -> int:
        """Start an exchange, and return the highest signal of all processes, or 0.

        The returned signal is from the previous exchange, or with `wait` from this one.
        """
        arrived = signals.arrived()
        if self._group is None:
            return arrived
        previous_result = self._result()
        flag = torch.tensor([arrived])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange_running = (work, flag)
        return self._result() if wait else previous_result

    def _result(self) -> int:
        """Result of the running exchange; 0 if no exchange is running."""
        if self._exchange_running is None:
            return 0
        work, flag = self._exchange_running
        self._exchange_running = None
        work.wait()
        return int(flag.item())  # on the host


def _writer(trainer: Trainer) -> LastCheckpoint | None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint):
            return callback
    return None


def _end_exchange_of_lightning(trainer: Trainer) -> None:
    """Switch off Lightning's own exchange of SIGTERM, which waits for the device in each step."""
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
