"""Run a net in evaluation mode without gradients to inspect it, or copy a net."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Generator, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qat.errors import UsageError

# True while nets with unset scales may run; otherwise, they raise an error
# (`qat.model.scales.guard`).
unset_scales_allowed = ContextVar("unset_scales_allowed", default=False)


@contextlib.contextmanager
def allow_unset_scales() -> Generator[None]:
    """Let nets with unset scales run in this block. Do not use their outputs as logits."""
    token = unset_scales_allowed.set(True)
    try:
        yield
    finally:
        unset_scales_allowed.reset(token)


def zero_image(net: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Zeros (1, C, H, W), with the dtype and device of the net's first floating-point tensor.

    Buffers follow parameters, because a frozen net may have none. Without both: torch's defaults.
    """
    for tensor in itertools.chain(net.parameters(), net.buffers()):
        if tensor.is_floating_point():
            return tensor.new_zeros(1, *input_size)
    return torch.zeros(1, *input_size)


@contextlib.contextmanager
def probing(net: nn.Module, hooks: Iterable[RemovableHandle]) -> Generator[None]:
    """Run a net in eval mode and without gradients in this block, even if scales are unset.

    After the block, every module has its old mode again, and the hooks are removed.
    """
    modes = [(module, module.training) for module in net.modules()]
    handles = list(hooks)
    try:
        with torch.no_grad(), allow_unset_scales():
            net.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
            # LeViT and others cache biases in eval mode; later, their parameter may change.
            getattr(module, "attention_bias_cache", {}).clear()
        for handle in handles:
            handle.remove()


def copy_net(net: nn.Module) -> nn.Module:
    """Make a deep copy of a net; of a compiled net, copy the original net.

    Some nets store a tensor of their last forward pass (attention biases in TinyViT and LeViT).
    Such a tensor is copied without its autograd graph, which cannot be copied.
    """
    net = getattr(net, "_orig_mod", net)
    detached_copies: dict[int, Any] = {}
    for module in net.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                detached_copies[id(value)] = value.detach().clone()
    return copy.deepcopy(net, detached_copies)


def calibration_images(batch: Any, net: nn.Module) -> Tensor:
    """The calibration images of a batch, with the dtype and device of a net.

    Args:
        batch: float images (B, C, H, W), or a tuple or list that starts with them.
        net: net whose first parameter determines dtype and device.

    Raises:
        UsageError: the batch has another form, contains no images, or has non-finite values.
    """
    images = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(images, Tensor):
        raise _unusable_batch(type(images).__name__)
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise _unusable_batch(f"{images.dtype} {tuple(images.shape)}")
    if not images.isfinite().all():
        raise UsageError(
            "calibration images contain NaN or infinity; check data.mean, data.std and the files"
        )
    return images.to(next(net.parameters()))


def _unusable_batch(description: str) -> UsageError:
    return UsageError(
        f"calibration: a batch is {description}; "
        "must be float images (B, C, H, W), or (images, ...), in a list or a loader"
    )
