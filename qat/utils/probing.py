"""Look into a net by running it: evaluation mode, no gradients, hooks that are gone afterwards."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
