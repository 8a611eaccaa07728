"""Take an optimizer step back, bit for bit, decided on the host or, without waiting for it, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qat.shards import own

# What schedules set behind a step, whether it counts or not.
_SCHEDULED = ("lr", "initial_lr")
Numbers = tuple[dict[str, Any], dict[str, Any]]


class StepUndo:
    """Remembers what one optimizer step can change, and puts it back.

    That is: parameters, the optimizer's moments and counts, running statistics of batch norms, the epoch's means of the losses, and the
    state of callbacks that follow the steps (`state_follows_steps`). Schedules go on: a step taken back counts as a step of the run.

    On the device, tensors are chosen between by a flag that nobody waits for. What lies on the host (Adam's count of steps where it is
    not captured) is put right by `settle`, in front of the next step, when the flag has long arrived.
    """

    def __init__(self) -> None:
        self._optimizers: list[torch.optim.Optimizer] = []
        self._followers: list[Callback] = []
        self._norms: list[nn.Module] = []
        self._means: list[Any] = []
        self._forward: list[tuple[Tensor, Tensor]] = []
        self._averages: list[tuple[Any, str, Tensor]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._keys: list[tuple[dict[str, Any], set[str]]] = []
        self._numbers: list[Numbers] = []
        self._states: list[tuple[Callback, dict[str, Any]]] = []

    def attach(self, pl_module: LightningModule, optimizers: Iterable[torch.optim.Optimizer], callbacks: Iterable[Callback]) -> None:
        """Find what a step changes."""
        self._optimizers = list(optimizers)
        self._followers = [callback for callback in callbacks if getattr(callback, "state_follows_steps", False)]
        self._norms = [module for module in pl_module.modules() if isinstance(module, _NormBase)]
        self._means = list(getattr(pl_module, "train_means", nn.ModuleDict()).values())
        self._forget()

    def begin(self) -> None:
        """Remember what the forward passes of a step change; call it in front of the first of them."""
        self._forward = [(buffer, buffer.clone()) for norm in self._norms for buffer in norm.buffers(recurse=False)]
        self._averages = [(mean, name, value.clone()) for mean in self._means for name, value in mean.metric_state.items()]

    @torch.no_grad()
    def take(self) -> None:
        """Remember what the update changes; call it in front of it, and behind `settle` for the one before."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
        tensors = [p.detach() for group in groups for p in group["params"]]
        kept = [(key, value) for owner in (*groups, *states) for key, value in owner.items()]
        tensors += [value for key, value in kept if isinstance(value, Tensor) and key not in _SCHEDULED]
        self._tensors = [(own(tensor), own(tensor).clone()) for tensor in tensors]
        self._keys = [(state, set(state)) for state in states]
        self._numbers = [(owner, _counts(owner)) for owner in (*groups, *states)]
        self._states = [(callback, callback.state_dict()) for callback in self._followers]

    @torch.no_grad()
    def revert(self) -> None:
        """Put everything back."""
        for tensor, before in (*self._forward, *self._tensors):
            tensor.copy_(before)
        for mean, name, before in self._averages:
            setattr(mean, name, before)
        for callback, state in self._states:
            callback.load_state_dict(state)
        for owner, counts in self._numbers:
            owner.update(counts)
        self._drop_new_state()
        self._forget()

    @torch.no_grad()
    def revert_if(self, bad: Tensor) -> None:
        """Put back what is on the device of a flag where the flag is up; `settle` has to follow.

        Where the step made state that was not there before, there is nothing to choose between: the host looks at the flag, once.

        Args:
            bad: bool scalar.
        """
        after = [callback.state_dict() for callback, _ in self._states]
        if self._grew(after):
            if bad.item():
                self.revert()
            return
        for tensor, before in (*self._forward, *self._tensors):
            if tensor.device == bad.device:
                torch.where(bad, before, tensor, out=tensor)
        for mean, name, before in self._averages:
            setattr(mean, name, torch.where(bad, before, getattr(mean, name)))
        for (callback, state), now in zip(self._states, after, strict=True):
            callback.load_state_dict(_chosen(bad, state, now))
        self._tensors = [(tensor, before) for tensor, before in self._tensors if tensor.device != bad.device]
        self._forward, self._averages, self._states, self._keys = [], [], [], []

    @torch.no_grad()
    def settle(self, *, is_bad: bool) -> None:
        """Put back what is on the host if the flag of `revert_if` was up."""
        if is_bad:
            for tensor, before in self._tensors:
                tensor.copy_(before)
            for owner, counts in self._numbers:
                owner.update(counts)
        self._tensors, self._numbers = [], []

    def _grew(self, after: Sequence[Any]) -> bool:
        known = {id(state) for state, _ in self._keys}
        states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
        is_new = any(id(state) not in known for state in states) or any(set(state) != keys for state, keys in self._keys)
        return is_new or any(_shape(now) != _shape(before) for (_, before), now in zip(self._states, after, strict=True))

    def _drop_new_state(self) -> None:
        known = {id(state): keys for state, keys in self._keys}
        for optimizer in self._optimizers:
            for parameter, state in list(optimizer.state.items()):
                if id(state) not in known:
                    del optimizer.state[parameter]
                    continue
                for key in set(state) - known[id(state)]:
                    del state[key]

    def _forget(self) -> None:
        self._forward, self._averages, self._tensors, self._keys, self._numbers, self._states = [], [], [], [], [], []


def _counts(owner: dict[str, Any]) -> dict[str, Any]:
    """Numbers that an optimizer keeps in a group or a state: its counts of steps."""
    return {key: value for key, value in owner.items() if isinstance(value, int | float) and key not in _SCHEDULED}


def _shape(state: Any) -> Any:
    """What a state is made of."""
    return {key: _shape(value) for key, value in state.items()} if isinstance(state, dict) else None


def _chosen(bad: Tensor, before: Any, after: Any) -> Any:
    """One of two states of the same shape, tensor for tensor."""
    choose: Callable[[Any, Any], Any] = lambda old, new: _chosen(bad, old, new)  # noqa: E731
    if isinstance(after, dict):
        return {key: choose(before[key], value) for key, value in after.items()}
    if isinstance(after, Tensor) and after is not before:
        return torch.where(bad, before.to(after.device), after)
    return after
