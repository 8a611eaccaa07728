"""A run that gets a signal saves after the step under way and stops there, in all its processes at the same step."""

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
    """Writes `last.ckpt` and raises `Preempted` when a signal of `qat.launch.signals` has arrived in any process.

    Processes may see a signal in different steps, and none may stop alone: the others would wait for its gradients. After each step they
    start to exchange what they have seen, on the host, and read what was exchanged after the step before, so that all act after the same
    step, at most one later. The device is never waited for. A signal during a validation, or in the last step before one, is acted on
    after it.

    It is a `Checkpoint` for its place alone: Lightning calls those after all other callbacks, whose state the file has to hold. It has to
    be after `LastCheckpoint`, which writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._group: Any = None
        self._asked: tuple[dist.Work, Tensor] | None = None
        self._signal = 0
        self._looked_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait for the end of a step."""
        signals.defer(on=True)
        signals.listen()  # Lightning's own handlers, set a moment ago, would requeue the job from a checkpoint of their own
        self._asked, self._signal, self._looked_at = None, 0, trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            _end_exchange_of_lightning(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look after an optimizer step; save, unless the end of the epoch does so in a moment."""
        if trainer.global_step == self._looked_at or self._signal:
            return
        self._looked_at = trainer.global_step
        self._signal = self._exchange()
        if self._signal and not trainer.is_last_batch and (last := _writer(trainer)):
            last.save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before the next step: by now the figures of the last one are logged."""
        self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the epoch before, of which `LastCheckpoint` has saved the end, and whose figures are logged by now."""
        self._stop_if_any(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the evaluation; from here on a signal counts at once."""
        self._stop_if_any(trainer)
        signals.defer(on=False)

    def _stop_if_any(self, trainer: Trainer) -> None:
        """Stop if a signal has arrived in any process up to now; the processes wait for each other."""
        if not self._signal:
            self._signal = max(self._exchange(), self._exchange(wait=True))
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self._signal:
            signals.forget()
            signals.defer(on=True)  # whatever comes now finds a run that is leaving already
            last = _writer(trainer)
            raise Preempted(
                self._signal, trainer.global_step, None if last is None else last.saved(trainer)
            )

    def _exchange(self, *, wait: bool = False) -> int:
        """Start an exchange; the outcome of the one before it, or of this one, the same in all processes."""
        seen = signals.arrived()
        if self._group is None:
            return seen
        before = self._outcome()
        flag = torch.tensor([seen])
        self._asked = (
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True),
            flag,
        )
        return self._outcome() if wait else before

    def _outcome(self) -> int:
        if self._asked is None:
            return 0
        (work, flag), self._asked = self._asked, None
        work.wait()
        return int(flag.item())  # on the host


def _writer(trainer: Trainer) -> LastCheckpoint | None:
    return next((one for one in trainer.callbacks if isinstance(one, LastCheckpoint)), None)  # type: ignore[attr-defined]


def _end_exchange_of_lightning(trainer: Trainer) -> None:
    """Its loop exchanges, before each step, whether a SIGTERM has come to its own handler, and waits for the device to know."""
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
