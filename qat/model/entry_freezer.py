"""Freeze single entries of parameters during an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class EntryFreezer:
    """Sets gradients of frozen entries to zero before a step, and restores the entries after it.

    A zero gradient is not enough: weight decay and the momentum of earlier steps would still move
    an entry. The values are written back in a hook of the optimizer, so that EMA weights and
    checkpoints contain the frozen values. If a gradient scaler skips the step, the next `freeze`
    discards the values.

    Args:
        on_restore: function that is called after values were written back.
    """

    def __init__(self, on_restore: Callable[[], None] = lambda: None) -> None:
        self._on_restore = on_restore
        self._frozen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Register a hook for the steps of each optimizer, in place of earlier hooks."""
        self.detach()
        self._handles = [
            optimizer.register_step_post_hook(self._restore) for optimizer in optimizers
        ]

    def detach(self) -> None:
        """Remove the hooks and the frozen values."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._frozen = []

    @torch.no_grad()
    def freeze(self, entries: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Freeze only these entries during the next step.

        Args:
            entries: pairs of a parameter and a bool mask of the same shape; True = frozen.
        """
        self._frozen = []
        for parameter, mask in entries:
            if parameter.grad is not None:
                # Multiplying by the mask would keep NaN, because NaN * 0 is NaN.
                parameter.grad.masked_fill_(mask, 0.0)
            self._frozen.append((parameter, mask, parameter.detach().clone()))

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        frozen = self._frozen
        self._frozen = []
        for parameter, mask, values in frozen:
            parameter.copy_(torch.where(mask, values, parameter))
        if frozen:
            self._on_restore()
