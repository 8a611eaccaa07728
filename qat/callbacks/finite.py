"""A run whose loss is no longer a number stops, says where that came from, and leaves its checkpoints as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.callbacks.common import net_of
from qat.errors import UsageError
from qat.probing import probing
from qat.spec import check_whole


class StopOnNaN(Callback):
    """Stops a run when its loss is NaN or infinite.

    Looking at a loss waits for the device, so it is not done in every step: losses stay on the device and are looked at together, every n
    steps, at the end of an epoch and before a checkpoint is written. A checkpoint is written only if all losses up to it and all weights
    in it are finite, so the ones on disk are always good to go on from. The first step is looked at before its update; so is every step
    where that costs nothing (one process on a CPU) or where it is asked for (n = 1).

    The net is then run once more on the batch at hand to find the first module that makes a number that is none. Where losses are looked
    at late the weights have been damaged by then, and the module is a parameter; a run resumed with n = 1 repeats the same steps and stops
    in front of the damage.

    Where the loss of every step is looked at, so are the gradients, in front of the update: a clamped infinity gives a fine loss and no
    gradient. Not under a gradient scaler, which finds such steps itself and skips them.

    Args:
        every_n_steps: steps between looks at the losses.

    Raises:
        UsageError: the interval is not a whole number from 1; during training: a loss, a weight or the first images are not finite.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_whole("callbacks.finite.every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self._pending: list[tuple[int, Tensor]] = []
        self._batch: Any = None
        self._is_first = True
        self._looks_closely = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next batch is the first."""
        self._pending, self._batch, self._is_first = [], None, True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first images, and have the batch at hand in case of need."""
        self._batch = batch
        if self._is_first and not _all_finite(trainer, [batch[0]]):
            raise UsageError(f"data: the images of the first batch hold NaN or infinity, step {trainer.global_step} was not taken")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss; look at it where that is free or asked for."""
        self._pending.append((trainer.global_step, loss.detach()))
        self._looks_closely = self._is_first or self.every_n_steps == 1 or _is_free(trainer, loss)
        if self._looks_closely:
            self._check_losses(trainer, pl_module)
        self._is_first = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradients where the loss was looked at, unless a scaler does."""
        if not self._looks_closely or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = {name: value.grad for name, value in pl_module.named_parameters() if value.grad is not None}
        if not _all_finite(trainer, gradients.values()):
            which = _summary(gradients)
            self._stop(trainer, pl_module, f"gradients of step {trainer.global_step} hold NaN or infinity ({which})", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the losses since the last look if it is time."""
        if len(self._pending) >= self.every_n_steps or trainer.is_last_batch:
            self._check_losses(trainer, pl_module)
        self._batch = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at everything before a file is touched."""
        self._check_losses(trainer, pl_module)
        _check_weights(trainer, checkpoint["state_dict"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is evaluated next, also where no checkpoint was written."""
        _check_weights(trainer, pl_module.state_dict())

    def _check_losses(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pending, self._pending = self._pending, []
        if not pending or _all_finite(trainer, [loss for _, loss in pending]):
            return
        step, loss = next(((step, loss) for step, loss in pending if not loss.isfinite()), (pending[-1][0], None))
        value = "not finite in another process" if loss is None else f"{float(loss)}"
        seen_at = "" if trainer.global_step == step else f", seen at step {trainer.global_step}"
        self._stop(trainer, pl_module, f"the loss of step {step} is {value}{seen_at}", step)

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str, step: int) -> NoReturn:
        cause = "unknown" if self._batch is None else find_cause(pl_module, self._batch, trainer.precision_plugin.forward_context)
        raise UsageError(f"training stopped: {what}; first not finite: {cause}; {_way_out(step)}")


def _is_free(trainer: Trainer, loss: Tensor) -> bool:
    """True if looking at a loss waits for nothing: no device, no other process."""
    return loss.device.type == "cpu" and trainer.world_size == 1


def _way_out(step: int) -> str:
    if step == 0:
        return "no step was taken: look at the data and the weights it starts from"
    return "checkpoints are from before; a lower optimizer.lr or trainer.gradient_clip_val=1 may help"


def _check_weights(trainer: Trainer, state: Mapping[str, Any]) -> None:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if _all_finite(trainer, tensors.values()):
        return
    step = trainer.global_step
    raise UsageError(f"training stopped: weights hold NaN or infinity after step {step - 1} ({_summary(tensors)}); {_way_out(step)}")


def _summary(tensors: Mapping[str, Tensor]) -> str:
    damaged = [name.removeprefix("net.") for name, value in tensors.items() if not value.isfinite().all()]
    return f"{len(damaged)} tensors, first {damaged[0]}" if damaged else "in another process"


def _all_finite(trainer: Trainer, tensors: Iterable[Tensor]) -> bool:
    """One look at the device for all of them; all processes get the same answer, so that none waits for one that stopped."""
    tensors = list(tensors)
    finite = not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
    return trainer.strategy.reduce_boolean_decision(finite, all=True)


def find_cause(pl_module: LightningModule, batch: Any, context: Callable[[], AbstractContextManager] = torch.no_grad) -> str:
    """Where the first number comes from that is none: the batch, a parameter, a module, the teacher or the loss.

    Args:
        pl_module: has a `net`; and a `teacher`, or none.
        batch: images (B, C, H, W) and targets.
        context: precision under which the net is run.

    Returns:
        Words for a message. Nothing is changed; batch statistics are not updated.
    """
    images = batch[0]
    if not images.isfinite().all():
        return "the images of the batch"
    net = net_of(pl_module)
    damaged = [name for name, value in net.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    found: list[str] = []
    hooks = [module.register_forward_hook(_noting(name, found)) for name, module in net.named_modules()]
    with torch.compiler.set_stance("force_eager"), probing(net, hooks), context():
        net(images)
        teacher = getattr(pl_module, "teacher", None)
        teacher_fails = teacher is not None and not teacher(images).isfinite().all()
    if damaged:
        return f"{damaged[0]}, the first of {len(damaged)} weights that hold NaN or infinity"
    if found:
        return found[0]
    return "the teacher's logits" if teacher_fails else "the loss or its gradient (the net's outputs are finite)"


def _noting(name: str, found: list[str]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A hook that notes a module whose output is not finite; children come before their parents."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if found or _are_finite(output):
            return
        label = f"{name or 'the net'} ({type(module).__name__})"
        found.append(f"the output of {label}" if _are_finite(args) else f"the input of {label}")

    return hook


def _are_finite(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_are_finite(one) for one in value)
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
