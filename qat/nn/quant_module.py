"""Base class of modules that own quantizers, and how they keep quantized weights."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def shallow_cast(cls: type[M], module: nn.Module) -> M:
    """A module of class `cls` with the parameters, buffers, children and settings of `module`.

    Nothing is copied.
    """
    cast = cls.__new__(cls)
    cast.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        cast.__dict__[kind] = dict(module.__dict__[kind])
    return cast


def is_watched(module: nn.Module) -> bool:
    """True if the module has hooks or a replaced `forward`, as in calibration and analyses."""
    hooks = (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return bool(hooks) or "forward" in module.__dict__


class QuantModule(nn.Module):
    """A module with quantizers among its attributes."""

    # For each role, a key of everything that the quantized weight depends on, and the weight. None
    # = each forward pass quantizes again. `keep_weights` sets it.
    kept_weights: dict[str, tuple[Any, Tensor]] | None = None

    def latent(self, role: str) -> Tensor:
        """The float weight with this role, which the quantizer `<role>_quantizer` gets.

        Raises:
            KeyError: the module quantizes no weight with this role.
        """
        if role != "weight":
            raise KeyError(role)
        weight = self.weight
        assert isinstance(weight, Tensor)  # noqa: S101  (narrows a type)
        return weight

    def quantized(self, role: str) -> Tensor:
        """The quantized weight with this role."""
        quantizer = getattr(self, f"{role}_quantizer")
        locked = quantizer.stored_weight()
        if locked is not None:
            return locked
        if not torch.is_grad_enabled():
            cached = self.kept_weight(role)
            if cached is not None:
                return cached
        return quantizer(self.latent(role))

    def kept_weight(self, role: str) -> Tensor | None:
        """The quantized weight without gradient; None unless `keep_weights` is on.

        The weight is quantized again if it changed since the last call.
        """
        quantizer = getattr(self, f"{role}_quantizer")
        if torch.compiler.is_compiling() or self.kept_weights is None or is_watched(quantizer):
            return None
        sources = [*self.parameters(recurse=False), *quantizer.parameters(), *quantizer.buffers()]
        if any(t.is_inference() for t in sources):  # inference tensors do not count their changes
            return None
        versions = [(t.data_ptr(), t._version) for t in sources]
        key = (torch.is_inference_mode_enabled(), *versions)
        if role in self.kept_weights:
            kept_key, weight = self.kept_weights[role]
            if kept_key == key:
                return weight
        with torch.no_grad():
            weight = quantizer(self.latent(role))
        self.kept_weights[role] = (key, weight)
        return weight


def keep_weights(net: nn.Module, *, keep: bool) -> None:
    """Keep quantized weights from one forward pass to the next, or free them and stop keeping them.

    A weight is quantized again if torch counts a change. Changes through `.data`, by a fused
    optimizer or by a collective operation are not counted: call this function again after them.

    Args:
        net: the model.
        keep: True = keep weights; False = free them and stop.
    """
    for module in net.modules():
        if isinstance(module, QuantModule):
            module.kept_weights = {} if keep else None


@contextlib.contextmanager
def kept_weights(net: nn.Module) -> Generator[None]:
    """Keep quantized weights inside the block, in which they must not change."""
    keep_weights(net, keep=True)
    try:
        yield
    finally:
        keep_weights(net, keep=False)
