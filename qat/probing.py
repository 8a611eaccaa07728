"""Look into a net by running it: evaluation mode, no gradients, hooks that are gone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def probing(net: nn.Module, hooks: Iterable[RemovableHandle]) -> Generator[None]:
    """Evaluation mode without gradients; then every module's own mode again, and the hooks removed."""
    modes = [(module, module.training) for module in net.modules()]
    handles = list(hooks)
    try:
        with torch.no_grad():
            net.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
