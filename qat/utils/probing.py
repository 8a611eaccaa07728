"""Look into a net by running it: evaluation mode, no gradients, hooks that are gone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from contextvars import ContextVar

import torch
from torch import nn
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
