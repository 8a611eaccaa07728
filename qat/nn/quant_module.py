"""Shared by modules that own quantizers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def shallow_cast(cls: type[M], module: nn.Module) -> M:
    """A module of class `cls` with everything that `module` has: its parameters, buffers, children and settings, none of them copied."""
    made = cls.__new__(cls)
    made.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        made.__dict__[kind] = dict(module.__dict__[kind])
    return made


def is_watched(module: nn.Module) -> bool:
    """True if somebody wants to see what passes through the module, or to do it in another way, as calibration and analyses do."""
    hooks = (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return bool(hooks) or "forward" in module.__dict__


class QuantModule(nn.Module):
    """A module with quantizers among its attributes. `latent` gives the float tensor of a weight quantizer."""

    # Role: (what it was made of, quantized weight); None = every forward pass quantizes anew. Set by `keep_weights`.
    kept_weights: dict[str, tuple[Any, Tensor]] | None = None

    def latent(self, role: str) -> Tensor:
        """The float master of the weight with this role.

        Raises:
            KeyError: the module quantizes no such weight.
        """
        if role != "weight":
            raise KeyError(role)
        weight = self.weight
        assert isinstance(weight, Tensor)  # noqa: S101  (narrows a type)
        return weight

    def quantized(self, role: str) -> Tensor:
        """The quantized weight with this role."""
        held = getattr(self, f"{role}_quantizer").held()
        if held is not None:
            return held
        ready = None if torch.is_grad_enabled() else self.ready(role)
        return getattr(self, f"{role}_quantizer")(self.latent(role)) if ready is None else ready

    def ready(self, role: str) -> Tensor | None:
        """The quantized weight, without gradient, made when the weight was last changed; None where weights are not kept."""
        quantizer = getattr(self, f"{role}_quantizer")
        if torch.compiler.is_compiling() or self.kept_weights is None or is_watched(quantizer):
            return None
        made_of = [*self.parameters(recurse=False), *quantizer.parameters(), *quantizer.buffers()]
        if any(t.is_inference() for t in made_of):  # such tensors do not count their changes
            return None
        key = (torch.is_inference_mode_enabled(), *((t.data_ptr(), t._version) for t in made_of))
        found = self.kept_weights.get(role)
        if found is None or found[0] != key:
            with torch.no_grad():
                found = self.kept_weights[role] = (key, quantizer(self.latent(role)))
        return found[1]


def keep_weights(net: nn.Module, *, keep: bool) -> None:
    """Begin to keep quantized weights from one forward pass to the next, or give them back and stop.

    A weight that was changed since is quantized anew, if torch knows of the change: one through `.data`, by a fused optimizer or by a
    collective operation has to be followed by another call.
    """
    for module in net.modules():
        if isinstance(module, QuantModule):
            module.kept_weights = {} if keep else None


@contextlib.contextmanager
def kept_weights(net: nn.Module) -> Generator[None]:
    """Keep quantized weights inside the block, in which they do not change."""
    keep_weights(net, keep=True)
    try:
        yield
    finally:
        keep_weights(net, keep=False)
