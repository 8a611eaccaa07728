"""Look into a net by running it, or into a copy of it: evaluation mode, no gradients, hooks that are gone afterwards."""

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

# True while a net whose scales are not set may run; else it raises (`qat.model.scales.guard`).
unset_scales_allowed = ContextVar("unset_scales_allowed", default=False)


@contextlib.contextmanager
def allow_unset_scales() -> Generator[None]:
    """While it lasts, a net runs whether its scales are set or not: nobody takes its output for logits."""
    token = unset_scales_allowed.set(True)
    try:
        yield
    finally:
        unset_scales_allowed.reset(token)


def zero_image(net: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """(1, C, H, W), of the dtype and device of a net's first floating parameter or buffer: frozen nets may have buffers alone."""
    tensors = itertools.chain(net.parameters(), net.buffers(), [torch.zeros(())])
    return next(t for t in tensors if t.is_floating_point()).new_zeros(1, *input_size)


@contextlib.contextmanager
def probing(net: nn.Module, hooks: Iterable[RemovableHandle]) -> Generator[None]:
    """Evaluation mode without gradients, whether scales are set or not; then every module's own mode again, and the hooks removed."""
    modes = [(module, module.training) for module in net.modules()]
    handles = list(hooks)
    try:
        with torch.no_grad(), allow_unset_scales():
            net.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()


def copied(net: nn.Module) -> nn.Module:
    """A copy of a net, of the one inside where it is compiled.

    Some keep a tensor of their last forward (TinyViT, LeViT: attention biases); its graph, which nobody can copy, stays behind.
    """
    net = getattr(net, "_orig_mod", net)
    held = itertools.chain.from_iterable(tree_leaves(vars(module)) for module in net.modules())
    return copy.deepcopy(
        net, {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    )


def images_of(batch: Any, net: nn.Module) -> Tensor:
    """The images of a batch for calibration, as a net takes them: the batch itself, or the first of what a loader gives.

    Raises:
        UsageError: it is neither, holds no image, or there are values that are not finite.
    """
    images = batch[0] if isinstance(batch, tuple | list) else batch
    if not (
        isinstance(images, Tensor)
        and images.ndim == 4
        and len(images)
        and images.is_floating_point()
    ):
        what = (
            f"{images.dtype} {tuple(images.shape)}"
            if isinstance(images, Tensor)
            else type(images).__name__
        )
        raise UsageError(
            f"calibration: a batch is {what}; must be float images (B, C, H, W), or (images, ...), in a list or a loader"
        )
    if not images.isfinite().all():
        raise UsageError(
            "calibration images hold NaN or infinity; check data.mean, data.std and the files"
        )
    return images.to(next(net.parameters()))
