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
    state the file contains. This class must come after `LastCheckpoint`, which writes the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._group: Any = None
        self._running_exchange: tuple[dist.Work, Tensor] | None = None
        self._signal = 0
        self._checked_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, delay the reaction to signals until the end of a step."""
        signals.defer(on=True)
        # Replace Lightning's new handlers, which would requeue the job from their own file.
        signals.install_handlers()
        self._running_exchange = None
        self._signal = 0
        self._checked_step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            _disable_exchange_of_lightning(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, check for signals; save if there is one.

        At the end of an epoch, `LastCheckpoint` saves anyway.
        """
        if trainer.global_step == self._checked_step or self._signal:
            return
        self._checked_step = trainer.global_step
        self._signal = self._exchange()
        if self._signal and not trainer.is_last_batch:
            last_checkpoint = _find_last_checkpoint(trainer)
            if last_checkpoint is not None:
                last_checkpoint.save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """After a signal, stop here, where the metrics of the last step are logged already."""
        self._raise_if_signal(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a signal, stop here, where all earlier epochs are already saved and logged."""
        self._stop_if_any_signal(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a signal, stop before the evaluation; a later signal raises `Preempted` at once."""
        self._stop_if_any_signal(trainer)
        signals.defer(on=False)

    def _stop_if_any_signal(self, trainer: Trainer) -> None:
        """Stop if a signal has arrived in any process; the processes wait for each other."""
        if not self._signal:
            self._signal = max(self._exchange(), self._exchange(wait=True))
        self._raise_if_signal(trainer)

    def _raise_if_signal(self, trainer: Trainer) -> None:
        if not self._signal:
            return
        signals.forget_signals()
        signals.defer(on=True)  # so that later signals do not interrupt the end of the run
        last_checkpoint = _find_last_checkpoint(trainer)
        final_file = None if last_checkpoint is None else last_checkpoint.final_file(trainer)
        raise Preempted(self._signal, trainer.global_step, final_file)

    def _exchange(self, *, wait: bool = False) -> int:
        """Start an exchange, and return the highest signal of all processes, or 0.

        The signal is from the previous exchange, or with `wait` from this one. A single process
        only returns its own signal.
        """
        received_signal = signals.received_signal()
        if self._group is None:
            return received_signal
        previous_result = self._end_exchange()
        flag = torch.tensor([received_signal])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._running_exchange = (work, flag)
        return self._end_exchange() if wait else previous_result

    def _end_exchange(self) -> int:
        """Wait for the result of the running exchange; return 0 if no exchange is running."""
        if self._running_exchange is None:
            return 0
        work, flag = self._running_exchange
        self._running_exchange = None
        work.wait()
        return int(flag.item())  # on the CPU, so this does not wait for a GPU


def _find_last_checkpoint(trainer: Trainer) -> LastCheckpoint | None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint):
            return callback
    return None


def _disable_exchange_of_lightning(trainer: Trainer) -> None:
    """Disable Lightning's own exchange of SIGTERM, which waits for the device in each step."""
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
