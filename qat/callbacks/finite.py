"""A run whose loss, gradients or weights turn NaN or infinite ends, and its checkpoints stay those from before."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.errors import UsageError
from qat.lit.strategies import own
from qat.utils.probing import probing
from qat.utils.validate import check_int

_NEVER = 2**62


class FiniteCheck(Callback):
    """Ends a run at a non-finite (NaN or infinite) loss, gradient or weight, and names the step and the first module that gave one.

    The first bad step is kept on the device and read every n steps and before a checkpoint is written; on a CPU, where reading waits for
    nothing, before each update. Seen late the weights are damaged already: then the first of them is named. Gradients that a scaler
    checks itself (`trainer.precision=16-mixed`) are left to it.

    Args:
        every_n_steps: optimizer steps between two looks on an accelerator; 1 = the exact cause, at the price of waiting for each step.

    Raises:
        UsageError: the interval is not an integer of at least 1; during training: something is not finite.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_int("callbacks.finite.every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self._first_bad: Tensor | None = None  # (), int64; `_NEVER` while all is well
        self._images: Any = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the images, to find the module with."""
        self._images = batch[0]

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Note the loss."""
        self._note(trainer, loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the gradients, which are complete here and not yet clipped; look where it is due."""
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [
                own(p.grad)
                for p in pl_module.parameters()
                if p.grad is not None and own(p.grad).numel()
            ]
            self._note(
                trainer,
                torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).to(pl_module.device),
            )
        if _reading_is_free(pl_module) or (trainer.global_step + 1) % self.every_n_steps == 0:
            self._look(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at all steps and weights before a file is touched."""
        self._look(trainer)
        damaged = _damaged(checkpoint["state_dict"])
        if not trainer.strategy.reduce_boolean_decision(damaged is None, all=True):
            raise _error(
                f"weights after training step {trainer.global_step - 1} are not finite", damaged
            )

    def _note(self, trainer: Trainer, value: Tensor) -> None:
        step = torch.where(
            value.isfinite(), _NEVER, trainer.global_step
        )  # on the device: nothing waits for it
        self._first_bad = step if self._first_bad is None else torch.minimum(self._first_bad, step)

    def _look(self, trainer: Trainer) -> None:
        if self._first_bad is None:
            return
        step, self._first_bad = int(trainer.strategy.reduce(self._first_bad, reduce_op="min")), None
        if step != _NEVER:
            raise _error(
                f"the loss or a gradient of training step {step} is not finite",
                _first_not_finite(trainer, self._images),
            )


def _reading_is_free(pl_module: LightningModule) -> bool:
    return pl_module.device.type == "cpu"


def _error(what: str, first: str | None) -> UsageError:
    """What to say in every process: where the first that has found something has found it."""
    found = [first]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, first)
    nothing = "the loss or its gradient (the outputs of the model are finite)"
    where = min(
        filter(None, found), key=lambda one: one.startswith("the output"), default=nothing
    )  # a weight says more
    advice = "checkpoints were written before it; a lower optimizer.lr or trainer.gradient_clip_val=1 may help"
    return UsageError(f"training stopped: {what}; first: {where}; {advice}")


def _damaged(state: dict[str, Any]) -> str | None:
    """The first weight, of which this process may have a part, that is not finite."""
    floats = (
        (name, own(value))
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    )
    return next(
        (name.removeprefix("net.") for name, value in floats if not value.isfinite().all()), None
    )


def _first_not_finite(trainer: Trainer, images: Tensor) -> str | None:
    """Images, a weight, or the first module whose output is not finite; the net runs once more, and is left as it was."""
    net: Any = trainer.lightning_module.net
    flags: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            flags.append((
                f"the output of {name or 'the model'} ({type(module).__name__})",
                output.isfinite().all(),
            ))

    hooks = [
        module.register_forward_hook(functools.partial(note, name))
        for name, module in net.named_modules()
    ]
    with (
        torch.compiler.set_stance("force_eager"),
        probing(net, hooks),
        trainer.precision_plugin.forward_context(),
    ):
        net(images)  # in all processes, also where the cause is known: they may share the weights
    if not images.isfinite().all():
        return "the images of the batch"
    return _damaged(net.state_dict()) or next(
        (label for label, is_finite in flags if not is_finite), None
    )
