"""End a run if its loss, gradients or weights are not finite, before a checkpoint is saved."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.errors import UsageError
from qat.lit.strategies import local_part
from qat.utils.probing import probing
from qat.utils.validate import check_int

OUTPUT = "the output of"  # first words of a cause that is a module's output
_NO_BAD_STEP = 2**62  # above every step number, so that the minimum over steps is the first bad one


class FiniteCheck(Callback):
    """Ends a run at a non-finite loss, gradient or weight, and names the step and the cause.

    Non-finite means NaN or infinite.

    The number of the first bad step is stored on the device. The callback reads the number every n
    steps and before a checkpoint is written, when weights are checked too; on a CPU, where reading
    does not have to wait, before each update. If the number is read late, weights are already
    damaged, and the error names the first damaged weight instead of the cause.
    With `trainer.precision=16-mixed`, the gradient scaler checks the gradients instead.

    Args:
        every_n_steps: optimizer steps between two reads on an accelerator; 1 finds the exact cause,
            but waits for the device in each step.

    Raises:
        UsageError: the interval is not an integer of at least 1; during training: a value is not
            finite.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_int("callbacks.finite.every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        # (), int64; `_NO_BAD_STEP` if all steps since the last read were finite, None = no steps
        self._first_bad_step: Tensor | None = None
        self._images: Any = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Store the images, so that the cause can be found later."""
        self._images = batch[0]

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Check the loss on the device."""
        self._record_if_bad(trainer, loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradients before clipping, if no scaler does; read the result if due."""
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = _gradients(pl_module)
            max_norm = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
            self._record_if_bad(trainer, max_norm.to(pl_module.device))
        is_due = (trainer.global_step + 1) % self.every_n_steps == 0
        if is_due or _reads_without_waiting(pl_module):
            self._raise_if_bad(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check all steps so far, and all weights, before a file is written."""
        self._raise_if_bad(trainer)
        bad_weight = _first_bad_weight(checkpoint["state_dict"])
        if not trainer.strategy.reduce_boolean_decision(bad_weight is None, all=True):
            raise _training_error(
                f"weights after training step {trainer.global_step - 1} are not finite", bad_weight
            )

    def _record_if_bad(self, trainer: Trainer, value: Tensor) -> None:
        # The check runs on the device, and the host does not wait for it.
        step = torch.where(value.isfinite(), _NO_BAD_STEP, trainer.global_step)
        if self._first_bad_step is not None:
            step = torch.minimum(self._first_bad_step, step)
        self._first_bad_step = step

    def _raise_if_bad(self, trainer: Trainer) -> None:
        if self._first_bad_step is None:
            return
        step = int(trainer.strategy.reduce(self._first_bad_step, reduce_op="min"))
        self._first_bad_step = None
        if step != _NO_BAD_STEP:
            raise _training_error(
                f"the loss or a gradient of training step {step} is not finite",
                _find_cause(trainer, self._images),
            )


def _reads_without_waiting(pl_module: LightningModule) -> bool:
    return pl_module.device.type == "cpu"


def _gradients(module: nn.Module) -> list[Tensor]:
    """The gradients, or this process's shards of them, except empty shards."""
    gradients = []
    for parameter in module.parameters():
        if parameter.grad is not None:
            gradients.append(local_part(parameter.grad))
    return [gradient for gradient in gradients if gradient.numel()]


def _training_error(problem: str, cause: str | None) -> UsageError:
    """Make an error that is the same in every process.

    The error names a bad weight or image, or else a bad output, from the lowest rank that found
    one; if none did, it names the loss.
    """
    causes = [cause]
    if dist.is_initialized() and dist.get_world_size() > 1:
        causes = [None] * dist.get_world_size()
        dist.all_gather_object(causes, cause)
    known_causes = [text for text in causes if text is not None]
    not_outputs = [text for text in known_causes if not text.startswith(OUTPUT)]
    default = "the loss or its gradient (the outputs of the model are finite)"
    first_cause = (*not_outputs, *known_causes, default)[0]
    return UsageError(
        f"training stopped: {problem}; first non-finite: {first_cause}; "
        "any saved checkpoint is from an earlier step; "
        "a lower optimizer.lr or trainer.gradient_clip_val=1 may help"
    )


def _first_bad_weight(state: dict[str, Any]) -> str | None:
    """Name of the first weight with a non-finite value in this process; None if all are finite."""
    for name, value in state.items():
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        if is_float and not local_part(value).isfinite().all():
            return name.removeprefix("net.")
    return None


def _find_cause(trainer: Trainer, images: Tensor) -> str | None:
    """Find the cause by another forward pass.

    The cause is the images, a weight, or the first module with a non-finite output; None if all
    these values are finite.
    """
    net: Any = trainer.lightning_module.net
    outputs: list[tuple[str, Tensor]] = []

    def check_output(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            label = f"{OUTPUT} {name or 'the model'} ({type(module).__name__})"
            outputs.append((label, output.isfinite().all()))

    hooks = []
    for name, module in net.named_modules():
        hook = functools.partial(check_output, name)
        hooks.append(module.register_forward_hook(hook))
    with (
        torch.compiler.set_stance("force_eager"),
        probing(net, hooks),
        trainer.precision_plugin.forward_context(),
    ):
        # All processes take part, even if the cause is known: weights may be sharded.
        net(images)
    if not images.isfinite().all():
        return "the images of the batch"
    bad_weight = _first_bad_weight(net.state_dict())
    if bad_weight is not None:
        return bad_weight
    for label, is_finite in outputs:
        if not is_finite:
            return label
    return None
