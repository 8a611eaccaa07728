"""Numerical faults of a run: found, named, and the run ended with its checkpoints as they were."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qat.callbacks.common import net_of
from qat.callbacks.fault_cause import ELSEWHERE, agreed, all_finite, find_cause, first_not_finite, summary_of, told_by_any
from qat.callbacks.fault_scales import ScaleWatch
from qat.errors import UsageError
from qat.utils.shards import own
from qat.utils.validate import check_choice, check_int

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
        overflow: module whose output left the range, where that was looked for.
    """

    number: int = 0
    batches: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    overflow: str | None = None

    def flags(self) -> Tensor:
        """Whether a loss is not finite, a gradient is not, and an output was not; (3,) bool, of this process."""
        is_bad = ~torch.stack([loss.isfinite() for loss in self.losses]).all()
        overflow = torch.full_like(is_bad, self.overflow is not None)
        return torch.stack([is_bad, torch.zeros_like(is_bad) if self.gradient is None else ~self.gradient.isfinite(), overflow])


class FaultGuard(Callback):
    """Ends a run whose losses, gradients or weights are non-finite (NaN or infinite), or step sizes of whose quantizers exploded.

    Looking waits for the device, so on an accelerator it is not done in every step: flags stay there and are looked at together, every n
    steps, at the end of an epoch and before a checkpoint is written. A checkpoint is written only if all steps up to it were fine and all
    weights in it are finite, so the ones on disk are always good to go on from. The first step is looked at before its update; so is
    every step where that costs nothing (on a CPU) or where it is asked for (n = 1).

    The net is then run once more on the batch at hand to find the first module whose output is non-finite. Where faults are seen late
    the weights have been damaged by then, and it is a parameter. In half precision the net is also run every n steps unasked: behind a
    quantizer an overflow is the highest code, and neither loss nor gradient need show it.

    A step that a gradient scaler skips is no fault, unless too many come in a row; `faults/skipped_by_scaler` counts them.

    Args:
        every_n_steps: steps between looks.
        max_in_a_row: the run ends when a gradient scaler skips so many steps in a row. One that starts at torch's 2^16 is down to 1/16 by
            20.
        max_scale_change: see `ScaleWatch`.
        dead_steps: see `ScaleWatch`.
        dead_scales: `warn` = a step size that is dead is a warning, once for each quantizer; `fault` = it ends the run, as a step size
            that has exploded always does.

    Raises:
        UsageError: a setting is out of range; during training: a fault.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        max_in_a_row: int = 20,
        max_scale_change: float = 1000.0,
        dead_steps: int = 100,
        dead_scales: str = "warn",
    ) -> None:
        check_int("callbacks.finite.every_n_steps", every_n_steps, 1)
        check_int("callbacks.finite.max_in_a_row", max_in_a_row, 1)
        check_choice("callbacks.finite.dead_scales", dead_scales, DEAD_SCALES)
        self.every_n_steps, self.max_in_a_row, self.dead_scales = every_n_steps, max_in_a_row, dead_scales
        self.skipped_by_scaler = self.in_a_row = 0
        self._scales = ScaleWatch(max_scale_change, dead_steps)
        self._step = Step()
        self._seen_late: list[Step] = []
        self._is_first = self._looks_closely = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count."""
        if stage == "fit":
            self.skipped_by_scaler = self.in_a_row = 0
            self._scales.starts = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next step is the first."""
        self._step, self._seen_late, self._is_first = Step(), [], True
        self._scales.attach(net_of(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first images, and have the batch at hand in case of need."""
        if self._is_first and not all_finite(trainer, [batch[0]]):
            raise UsageError(f"data: the images of the first batch hold NaN or infinity, step {trainer.global_step} was not taken")
        if self._step.gradient is not None or not self._step.batches:
            self._step = Step(trainer.global_step)
        self._step.batches = [*(self._step.batches if _is_free(batch[0]) else []), batch]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss."""
        self._step.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Note the gradients, which are complete here and not yet clipped; look where that is free or asked for."""
        step = self._step
        gradients = [own(value.grad) for value in pl_module.parameters() if value.grad is not None and own(value.grad).numel()]
        step.gradient = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).to(step.losses[-1].device)
        self._looks_closely = self._is_first or self.every_n_steps == 1 or _is_free(step.losses[-1])
        self._is_first = False
        if step.number % self.every_n_steps == 0 and str(trainer.precision).startswith(("16", "bf16")):
            step.overflow = first_not_finite(net_of(pl_module), step.batches[-1][0], trainer.precision_plugin.forward_context)
        if self._looks_closely:
            self._look_at(trainer, [step])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the step sizes that the update made, if there was one."""
        step = self._step
        if step.gradient is None:
            return
        if self._looks_closely:
            self._look_at_scales(trainer, step)
        else:
            step.batches = step.batches[-1:]
            self._seen_late.append(step)
            if len(self._seen_late) >= self.every_n_steps or trainer.is_last_batch:
                self._look_late(trainer)
        if self.skipped_by_scaler:
            # Lightning copies a number to the device, which waits for it.
            count = torch.full((), float(self.skipped_by_scaler), device=pl_module.device)
            pl_module.log("faults/skipped_by_scaler", count, on_step=True, on_epoch=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at everything before a file is touched."""
        self._look_late(trainer)
        self._check_weights(trainer, checkpoint["state_dict"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is evaluated next, also where no checkpoint was written."""
        self._look_late(trainer)
        self._check_weights(trainer, pl_module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the step sizes at the start."""
        counts = {"skipped_by_scaler": self.skipped_by_scaler, "in_a_row": self.in_a_row}
        return {**counts, "scales": {name: start.cpu() for name, start in self._scales.starts.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.skipped_by_scaler, self.in_a_row = state_dict["skipped_by_scaler"], state_dict["in_a_row"]
        self._scales.starts = dict(state_dict["scales"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the run."""
        self._seen_late, self._step = [], Step()

    def _look_late(self, trainer: Trainer) -> None:
        """Look at the steps since the last look."""
        steps, self._seen_late = self._seen_late, []
        if not steps:
            return
        for one in steps:
            one.batches = steps[-1].batches
        self._look_at(trainer, steps)
        self._look_at_scales(trainer, steps[-1])

    def _look_at(self, trainer: Trainer, steps: list[Step]) -> None:
        """Look at losses, gradients and outputs of some steps, all at once."""
        flags = agreed(torch.stack([one.flags() for one in steps]))
        for one, (loss, gradient, overflow) in zip(steps, flags.bool().tolist(), strict=True):
            if loss or gradient or overflow:
                self._judge(trainer, one, loss=loss, gradient=gradient, overflow=overflow)
            else:
                self.in_a_row = 0

    def _judge(self, trainer: Trainer, step: Step, *, loss: bool, gradient: bool, overflow: bool) -> None:
        """Say what is wrong with a step, unless a gradient scaler sees to it."""
        if gradient and not (loss or overflow) and getattr(trainer.precision_plugin, "scaler", None) is not None:
            self._skipped_by_scaler(step, str(trainer.precision))
            return
        late = "" if self._looks_closely else f", seen at step {trainer.global_step}"
        pl_module, what, batch = trainer.lightning_module, f"step {step.number} overflows", None
        if loss or gradient:
            what, batch = self._told(pl_module, step, loss=loss, gradient=gradient)
        cause = find_cause(pl_module, batch or step.batches[-1], trainer.precision_plugin.forward_context)
        _stop(step.number, f"{what}{late}; first not finite: {told_by_any(step.overflow or cause)}")

    def _skipped_by_scaler(self, step: Step, precision: str) -> None:
        """Count a step that the gradient scaler leaves out, which is how it finds its scale, unless that goes on."""
        self.skipped_by_scaler, self.in_a_row = self.skipped_by_scaler + 1, self.in_a_row + 1
        if self.in_a_row >= self.max_in_a_row:
            what = f"gradients of step {step.number} overflow in precision {precision}, whatever their scale"
            _stop(
                step.number, f"{what}; {self.in_a_row} steps in a row were skipped by the gradient scaler (callbacks.finite.max_in_a_row)"
            )

    def _told(self, pl_module: LightningModule, step: Step, *, loss: bool, gradient: bool) -> tuple[str, Any]:
        """The clause on a loss or a gradient, and the batch to look into."""
        if loss:
            bad = next((i for i, one in enumerate(step.losses) if not one.isfinite()), None)
            value = "not finite in another process" if bad is None else f"{float(step.losses[bad])}"
            is_there = bad is not None and len(step.batches) == len(step.losses)
            return f"the loss of step {step.number} is {value}", step.batches[bad] if is_there and bad is not None else None
        gradients = {name: own(value.grad) for name, value in pl_module.named_parameters() if value.grad is not None}
        which = f" ({told_by_any(summary_of(gradients), ELSEWHERE)})" if self._looks_closely else ""
        return f"gradients of step {step.number} hold NaN or infinity{which}", None

    def _look_at_scales(self, trainer: Trainer, step: Step) -> None:
        """Look at the step sizes behind a step; warn once of all those of a quantizer that are dead."""
        kind, index, value = self._scales.look(step.number).tolist()
        if not kind:
            return
        what = f"behind step {step.number} {self._scales.describe(int(index), value)}"
        if kind == ScaleWatch.EXPLODED or self.dead_scales == "fault":
            _stop(step.number, what)
        self._scales.forget(int(index))
        if trainer.is_global_zero:
            since = f"no longer a step for {self._scales.dead_steps} steps"
            log.warning("%s, %s; a lower optimizer.lr, or a start from trained weights, may help", what, since)

    def _check_weights(self, trainer: Trainer, state: dict[str, Any]) -> None:
        tensors = {name: own(value) for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
        if not all_finite(trainer, tensors.values()):
            which = told_by_any(summary_of(tensors), ELSEWHERE)
            _stop(trainer.global_step, f"weights hold NaN or infinity after step {trainer.global_step - 1} ({which})")


def _is_free(tensor: Tensor) -> bool:
    """True if looking at a tensor waits for no device."""
    return tensor.device.type == "cpu"


def _stop(step: int, fault: str) -> NoReturn:
    """End the run.

    Raises:
        UsageError: always.
    """
    before = "no step was taken: look at the data and the weights it starts from"
    later = "checkpoints are from before; a lower optimizer.lr or trainer.gradient_clip_val=1 may help"
    raise UsageError(f"training stopped: {fault}; {later if step else before}")
