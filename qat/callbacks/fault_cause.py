"""Where the first non-finite number (NaN or infinite) comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qat.callbacks.common import net_of
from qat.utils.probing import probing
from qat.utils.shards import own

Context = Callable[[], AbstractContextManager]
UNKNOWN = "the loss or its gradient (the net's outputs are finite)"
ELSEWHERE = "in another process"


def find_cause(pl_module: LightningModule, batch: Any, context: Context = torch.no_grad) -> str:
    """Where the first non-finite number comes from: the batch, a parameter, a module, the teacher or the loss.

    Args:
        pl_module: has a `net`; and a `teacher`, or none.
        batch: images (B, C, H, W) and targets.
        context: precision under which the net is run.

    Returns:
        Words for a message. Nothing is changed; batch statistics are not updated.
    """
    images, net = batch[0], net_of(pl_module)
    at_rest = _at_rest(images, net)
    if agreed(torch.tensor([at_rest is not None], device=images.device)).item():  # a net that processes share runs in all or in none
        return at_rest or UNKNOWN
    found = first_not_finite(net, images, context)
    if found is not None:
        return found
    return "the teacher's logits" if _teacher_fails(pl_module, images, context) else UNKNOWN


def _at_rest(images: Tensor, net: nn.Module) -> str | None:
    """What is at fault before the net is run; of weights that processes share, this one's part is looked at."""
    if not images.isfinite().all():
        return "the images of the batch"
    damaged = [name for name, value in net.state_dict().items() if value.is_floating_point() and not own(value).isfinite().all()]
    return f"{damaged[0]}, the first of {len(damaged)} weights that hold NaN or infinity" if damaged else None


def first_not_finite(net: nn.Module, images: Tensor, context: Context = torch.no_grad) -> str | None:
    """The first module whose output is not finite, in the order in which outputs are made; None if all are.

    The net runs once in evaluation mode; the device is waited for once, behind it.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []
    hooks = [module.register_forward_hook(_noting(name, seen)) for name, module in net.named_modules()]
    with torch.compiler.set_stance("force_eager"), probing(net, hooks), context():
        net(images)
    if not seen:
        return None
    flags = torch.stack([torch.stack(pair) for _, *pair in seen]).tolist()
    for (label, *_), (is_fine, was_fine) in zip(seen, flags, strict=True):
        if not is_fine:
            return f"the output of {label}" if was_fine else f"the input of {label}"
    return None


def agreed(flags: Tensor) -> Tensor:
    """Flags that are up in any process, the same in all of them: int32, the shape of `flags`. On the device; nothing is waited for."""
    flags = flags.to(torch.int32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def all_finite(trainer: Trainer, tensors: Iterable[Tensor]) -> bool:
    """One look at the device for all of them; all processes get the same answer, so that none waits for one that stopped."""
    tensors = list(tensors)
    finite = not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
    return trainer.strategy.reduce_boolean_decision(finite, all=True)


def told_by_any(cause: str, unknown: str = UNKNOWN) -> str:
    """The first process's words that name a place, where processes found different ones."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return cause
    told: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(told, cause)
    rank, cause = next(((rank, one) for rank, one in enumerate(told) if one != unknown), (0, unknown))
    return cause if cause == told[0] else f"{cause} in process {rank}"


def summary_of(tensors: Mapping[str, Tensor]) -> str:
    """How many of some tensors are not finite, and which is the first."""
    damaged = [name.removeprefix("net.") for name, value in tensors.items() if not value.isfinite().all()]
    return f"{len(damaged)} tensors, first {damaged[0]}" if damaged else ELSEWHERE


def _teacher_fails(pl_module: LightningModule, images: Tensor, context: Context) -> bool:
    teacher = getattr(pl_module, "teacher", None)
    if teacher is None:
        return False
    with torch.no_grad(), context():
        return not teacher(images).isfinite().all()


def _noting(name: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A hook that notes whether a module's output and its inputs are finite; children come before their parents."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs, inputs = _tensors(output), _tensors(args)
        if outputs:
            fine = _finite(outputs)
            seen.append((f"{name or 'the net'} ({type(module).__name__})", fine, _finite(inputs) if inputs else torch.ones_like(fine)))

    return hook


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple | list):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def _finite(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
