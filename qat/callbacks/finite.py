"""Numerical faults of a run: found, named, and acted upon, with checkpoints left as they were."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from qat.callbacks.common import net_of
from qat.callbacks.fault_cause import ELSEWHERE, agreed, all_finite, find_cause, first_not_finite, summary_of, told_by_any
from qat.callbacks.fault_policy import Fault, Response
from qat.callbacks.fault_scales import ScaleWatch
from qat.callbacks.fault_undo import StepUndo
from qat.callbacks.last import NAME, LastCheckpoint
from qat.errors import UsageError
from qat.shards import own
from qat.spec import check_choice, check_whole

log = logging.getLogger(__name__)

DEAD_SCALES = ("warn", "fault")


@dataclass
class Step:
    """One optimizer step.

    Attributes:
        number: counted from 0.
        batches: of this process; all that were accumulated, or the last where none will be asked for.
        losses: one for each accumulated batch.
        gradient: largest magnitude among the gradients, not finite if one of them is not; None until they are there.
        scales: what `ScaleWatch.look` said behind the step.
        overflow: module whose output left the range, where that was looked for.
    """

    number: int = 0
    batches: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    scales: Tensor | None = None
    overflow: str | None = None

    def flags(self) -> Tensor:
        """Whether a loss is not finite, and whether a gradient is not; (2,) bool, of this process."""
        is_bad = ~torch.stack([loss.isfinite() for loss in self.losses]).all()
        return torch.stack([is_bad, torch.zeros_like(is_bad) if self.gradient is None else ~self.gradient.isfinite()])


class FaultGuard(Callback):
    """Looks for losses, gradients and weights that are NaN or infinite, and for step sizes of quantizers that are dead.

    Looking waits for the device, so on an accelerator it is not done in every step: flags stay there and are looked at together, every n
    steps, at the end of an epoch and before a checkpoint is written. A checkpoint is written only if all steps up to it were fine and all
    weights in it are finite, so the ones on disk are always good to go on from. The first step is looked at before its update; so is
    every step where that costs nothing (on a CPU) or where it is asked for (n = 1).

    The net is then run once more on the batch at hand to find the first module that makes a number that is none. In half precision that
    is also done every n steps unasked: behind a quantizer an overflow is the highest code, and neither loss nor gradient need show it.

    Policies:
    - `stop`: the run ends. Where faults are seen late the weights have been damaged by then, and the module is a parameter.
    - `skip`: a step at fault changes nothing (`StepUndo`), in no process. On an accelerator the device chooses between the weights of
      before and after, and the host reads the flag of a step in front of the next update, with a whole step in the device's queue.
    - `rollback`: `RollBack` is raised, for whoever called `fit` to go on from `last.ckpt` (`qat.tasks.faults`). Steps up to the
      fault are repeated with a look at each; one that is at fault again is left out as under `skip`.

    A step that a gradient scaler skips is no fault, unless too many come in a row.

    Args:
        policy: what is done about a fault.
        every_n_steps: steps between looks.
        max_in_a_row: the run stops when so many steps on end were left out. A scaler that starts at torch's 2^16 is down to 1/16 by 20.
        max_rollbacks: how often a run goes back; a later fault stops it.
        max_scale_change: see `ScaleWatch`; likewise `dead_steps`.
        dead_scales: `warn` = a step size that is dead is a warning, once for
            each quantizer; `fault` = it is one, as a step size that has exploded always is.

    Raises:
        UsageError: a setting is out of range, or there is nothing to roll back to; during training: a fault ends the run.
    """

    def __init__(
        self,
        policy: str = "stop",
        every_n_steps: int = 50,
        max_in_a_row: int = 20,
        max_rollbacks: int = 3,
        max_scale_change: float = 1000.0,
        dead_steps: int = 100,
        dead_scales: str = "warn",
    ) -> None:
        check_choice("callbacks.finite.dead_scales", dead_scales, DEAD_SCALES)
        check_whole("callbacks.finite.every_n_steps", every_n_steps, 1)
        self.policy, self.every_n_steps, self.dead_scales = policy, every_n_steps, dead_scales
        self._response = Response(policy, max_in_a_row, max_rollbacks)
        self._scales = ScaleWatch(max_scale_change, dead_steps)
        self._undo = StepUndo()
        self._last: LastCheckpoint | None = None
        self._fit: tuple[Trainer, LightningModule] | None = None
        self._step = Step()
        self._seen_late: list[Step] = []
        self._unsettled: tuple[Step, Tensor, torch.Event | None] | None = None
        self._is_first = self._looks_closely = True
        self._is_bad = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count; know where to go back to."""
        if stage != "fit":
            return
        self._response.begin()
        self._scales.starts = {}
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Find what a run would go back to.

        Raises:
            UsageError: there is nothing under `rollback`.
        """
        if self.policy == "rollback":
            self._last = _writer(trainer)
            self._response.path = None if self._last is None else Path(self._last.dirpath or "") / NAME

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next step is the first; a run that may go back has a checkpoint from now on."""
        self._fit = trainer, pl_module
        self._step, self._seen_late, self._unsettled, self._is_first = Step(), [], None, True
        self._scales.attach(net_of(pl_module))
        self._undo.attach(pl_module, trainer.optimizers, trainer.callbacks)  # type: ignore[attr-defined]
        path = self._response.path
        if self._last is not None and path is not None and not trainer.strategy.broadcast(path.is_file()):
            self._last.save_start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first images, and have the batch at hand in case of need."""
        if self._is_first and self.policy != "skip" and not self._response.until and not all_finite(trainer, [batch[0]]):
            raise UsageError(f"data: the images of the first batch hold NaN or infinity, step {trainer.global_step} was not taken")
        if self._step.gradient is not None or not self._step.batches:
            self._step = Step(trainer.global_step)
        skips = self._response.skips(self._step.number)
        if skips and not self._step.batches:
            self._undo.begin()
        self._step.batches = [*(self._step.batches if skips or _is_free(batch[0]) else []), batch]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss."""
        self._step.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Note the gradients, which are complete here and not yet clipped; look where that is free or asked for."""
        step = self._step
        gradients = [own(value.grad) for value in pl_module.parameters() if value.grad is not None and own(value.grad).numel()]
        step.gradient = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).to(step.losses[-1].device)
        closely = self._is_first or self.every_n_steps == 1 or _is_free(step.losses[-1]) or self._response.repeats(step.number)
        self._looks_closely, self._is_first, self._is_bad = closely, False, False
        if self._response.skips(step.number):
            self._settle()
            self._undo.take()
        if step.number % self.every_n_steps == 0 and str(trainer.precision).startswith(("16", "bf16")):
            step.overflow = first_not_finite(net_of(pl_module), step.batches[-1][0], trainer.precision_plugin.forward_context)
        if closely:
            self._look_ahead(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at what the update made, if there was one; take it back where it is at fault."""
        step = self._step
        if step.gradient is None:
            return
        if self._looks_closely:
            self._look_back()
        elif self._response.skips(step.number):
            self._take_back()
        else:
            step.batches = step.batches[-1:]
            self._seen_late.append(step)
            if len(self._seen_late) >= self.every_n_steps or trainer.is_last_batch:
                self._look_late()
        # Lightning copies a number to the device, which waits for it.
        figures = {name: torch.full((), count, device=pl_module.device) for name, count in self._response.figures().items()}
        pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at everything before a file is touched."""
        self._look_late()
        self._check_weights(trainer, checkpoint["state_dict"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is evaluated next, also where no checkpoint was written."""
        self._settle()
        self._look_late()
        self._check_weights(trainer, pl_module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the step sizes at the start. The optimizer's state is written next, so what is open is settled first."""
        self._settle()
        return {**self._response.state_dict(), "scales": {name: start.cpu() for name, start in self._scales.starts.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._response.load_state_dict(state_dict)
        self._scales.starts = dict(state_dict["scales"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the run."""
        self._fit, self._unsettled, self._seen_late, self._step = None, None, [], Step()

    def _look_ahead(self, optimizer: torch.optim.Optimizer) -> None:
        """In front of an update: look at loss and gradients. One that is left out is not even tried."""
        step = self._step
        overflows = torch.tensor([step.overflow is not None], device=step.losses[-1].device)
        loss, gradient, overflow = agreed(torch.cat([step.flags(), overflows])).bool().tolist()
        if loss or gradient or overflow:
            self._is_bad = True
            self._judge(step, loss=loss, gradient=gradient, overflow=overflow)
            if self._response.skips(step.number):
                optimizer.zero_grad(set_to_none=True)

    def _look_back(self) -> None:
        """Behind an update: look at the step sizes; undo it if anything was wrong."""
        step = self._step
        kind, index, value = self._scales.look(step.number).tolist()
        if kind and not self._is_bad:
            self._is_bad = self._is_fault(kind)
            self._tell_scale(step, kind, index, value)
        if self._is_bad and self._response.skips(step.number):
            self._undo.revert()
        if not self._is_bad:
            self._response.went_well()

    def _take_back(self) -> None:
        """Behind an update on an accelerator: undo it if anything was wrong, without knowing."""
        step = self._step
        scales = self._scales.look(step.number).to(step.losses[-1].device)
        overflow = torch.tensor([step.overflow is not None]).to(scales.device, non_blocking=True)
        flags = agreed(torch.cat([step.flags(), overflow, scales[:1] >= self._least_fault]))
        self._undo.revert_if(flags.any())
        seen = torch.cat([flags[:-1].float(), scales]).to("cpu", non_blocking=True)
        arrives = torch.Event(device=scales.device) if scales.device.type != "cpu" else None
        if arrives is not None:
            arrives.record()
        self._unsettled = step, seen, arrives

    def _settle(self) -> None:
        """Read the flags of the step before, which have been under way since."""
        if self._unsettled is None:
            return
        (step, seen, arrives), self._unsettled = self._unsettled, None
        if arrives is not None:
            arrives.synchronize()
        loss, gradient, overflow, kind, index, value = seen.tolist()
        self._undo.settle(is_bad=bool(loss or gradient or overflow or self._is_fault(kind)))
        if loss or gradient or overflow:
            self._judge(step, loss=bool(loss), gradient=bool(gradient), overflow=bool(overflow))
        elif kind:
            self._tell_scale(step, kind, index, value)
        else:
            self._response.went_well()

    def _look_late(self) -> None:
        """Look at the steps since the last look."""
        steps, self._seen_late = self._seen_late, []
        if not steps or self._fit is None:
            return
        overflows = torch.tensor([[one.overflow is not None] for one in steps]).to(steps[-1].losses[-1].device)
        flags = agreed(torch.cat([torch.stack([one.flags() for one in steps]), overflows], dim=1))
        scales = self._scales.look(steps[-1].number)
        for one, (loss, gradient, overflow) in zip(steps, flags.bool().tolist(), strict=True):
            one.batches = steps[-1].batches
            if loss or gradient or overflow:
                self._judge(one, loss=loss, gradient=gradient, overflow=overflow)
            else:
                self._response.went_well()
        kind, index, value = scales.tolist()
        if kind:
            self._tell_scale(steps[-1], kind, index, value)

    def _judge(self, step: Step, *, loss: bool, gradient: bool, overflow: bool) -> None:
        """Say what is wrong with a step, and act on it."""
        trainer, pl_module = self._running()
        seen = trainer.global_step if step.number == trainer.global_step else trainer.global_step - 1
        if gradient and not (loss or overflow) and self._scaler_acts():
            what = f"gradients of step {step.number} overflow in precision {trainer.precision}, whatever their scale"
            self._response.scaler_skipped(Fault(step.number, what, "", seen))
            return
        late = "" if self._looks_closely or self._response.skips(step.number) else f", seen at step {trainer.global_step}"
        what, batch = self._told(step, loss=loss, gradient=gradient) if loss or gradient else (f"step {step.number} overflows", None)
        cause = find_cause(pl_module, batch or step.batches[-1], trainer.precision_plugin.forward_context)
        self._response.to(Fault(step.number, what + late, told_by_any(step.overflow or cause), seen))

    def _told(self, step: Step, *, loss: bool, gradient: bool) -> tuple[str, Any]:
        """The clause on a loss or a gradient, and the batch to look into."""
        if loss:
            bad = next((i for i, one in enumerate(step.losses) if not one.isfinite()), None)
            value = "not finite in another process" if bad is None else f"{float(step.losses[bad])}"
            is_there = bad is not None and len(step.batches) == len(step.losses)
            return f"the loss of step {step.number} is {value}", step.batches[bad] if is_there and bad is not None else None
        _, pl_module = self._running()
        gradients = {name: own(value.grad) for name, value in pl_module.named_parameters() if value.grad is not None}
        which = f" ({told_by_any(summary_of(gradients), ELSEWHERE)})" if self._looks_closely else ""
        return f"gradients of step {step.number} hold NaN or infinity{which}", None

    @property
    def _least_fault(self) -> int:
        return ScaleWatch.DEAD if self.dead_scales == "fault" else ScaleWatch.EXPLODED

    def _is_fault(self, kind: float) -> bool:
        return kind >= self._least_fault

    def _tell_scale(self, step: Step, kind: float, index: float, value: float) -> None:
        """Act on a step size, or warn of all those of its quantizer once."""
        what = f"behind step {step.number} {self._scales.describe(int(index), value)}"
        if self._is_fault(kind):
            self._response.to(Fault(step.number, what, "", step.number))
            return
        self._scales.forget(int(index))
        trainer, _ = self._running()
        if trainer.is_global_zero:
            since = f"no longer a step for {self._scales.dead_steps} steps"
            log.warning("%s, %s; a lower optimizer.lr, or a start from trained weights, may help", what, since)

    def _check_weights(self, trainer: Trainer, state: dict[str, Any]) -> None:
        tensors = {name: own(value) for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
        if not all_finite(trainer, tensors.values()):
            taken = trainer.global_step - 1
            what = f"weights hold NaN or infinity after step {taken} ({told_by_any(summary_of(tensors), ELSEWHERE)})"
            self._response.to(Fault(trainer.global_step, what, "", taken, is_undone=False))

    def _scaler_acts(self) -> bool:
        trainer, _ = self._running()
        return getattr(trainer.precision_plugin, "scaler", None) is not None

    def _running(self) -> tuple[Trainer, LightningModule]:
        if self._fit is None:
            raise RuntimeError("no fit is running")
        return self._fit


def _is_free(tensor: Tensor) -> bool:
    """True if looking at a tensor waits for no device."""
    return tensor.device.type == "cpu"


def _writer(trainer: Trainer) -> LastCheckpoint | None:
    """Who writes the checkpoint to go back to; None under `fast_dev_run`.

    Raises:
        UsageError: there is no such callback, or processes that cannot begin anew.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UsageError("callbacks.finite.policy='rollback': processes of this trainer.strategy end with a fault; allowed is ddp")
    last = next((one for one in trainer.callbacks if isinstance(one, LastCheckpoint)), None)  # type: ignore[attr-defined]
    if last is None or last.dirpath is None:
        raise UsageError("callbacks.finite.policy='rollback': nothing to go back to without callbacks.last; allowed are stop, skip")
    return None if trainer.fast_dev_run else last  # type: ignore[attr-defined]
