"""Base class of modules that own quantizers, with a cache for quantized weights."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def shallow_cast(cls: type[M], module: nn.Module) -> M:
    """A module of class `cls` that shares parameters, buffers, children and settings of `module`.

    No tensor or child is copied, but setting an attribute of the result leaves `module` as is.
    """
    cast = cls.__new__(cls)
    cast.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        cast.__dict__[kind] = dict(module.__dict__[kind])
    return cast


def is_hooked(module: nn.Module) -> bool:
    """True if the module has hooks or a replaced `forward`, as in calibration and analyses.

    Such a module cannot be fused: a fused Function would skip its hooks and `forward`.
    """
    hooks = (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return bool(hooks) or "forward" in module.__dict__


class QuantModule(nn.Module):
    """A module with quantizers among its attributes."""

    # For each role (see `latent`): a key that shows changes of the tensors that the quantized
    # weight depends on, and this weight. None = no cache. `keep_weights` turns it on and off.
    weight_cache: dict[str, tuple[Any, Tensor]] | None = None

    def latent(self, role: str) -> Tensor:
        """The float weight with this role: the input of the quantizer `<role>_quantizer`.

        Raises:
            KeyError: the module quantizes no weight with this role.
        """
        if role != "weight":
            raise KeyError(role)
        weight = self.weight
        assert isinstance(weight, Tensor)  # noqa: S101  (narrows a type)
        return weight

    def quantized_weight(self, role: str) -> Tensor:
        """The quantized weight with this role."""
        quantizer = getattr(self, f"{role}_quantizer")
        stored = quantizer.stored_weight()
        if stored is not None:
            return stored
        if not torch.is_grad_enabled():
            cached_weight = self.cached_weight(role)
            if cached_weight is not None:
                return cached_weight
        return quantizer(self.latent(role))

    def cached_weight(self, role: str) -> Tensor | None:
        """The cached quantized weight, without gradient.

        A weight that changed since the last call is quantized again. Returns None if the cache is
        off (see `keep_weights`), in compiled graphs, for inference tensors, and if the quantizer is
        hooked.
        """
        quantizer = getattr(self, f"{role}_quantizer")
        if torch.compiler.is_compiling() or self.weight_cache is None or is_hooked(quantizer):
            return None
        sources = [*self.parameters(recurse=False), *quantizer.parameters(), *quantizer.buffers()]
        if any(t.is_inference() for t in sources):  # inference tensors do not count their changes
            return None
        versions = [(t.data_ptr(), t._version) for t in sources]
        key = (torch.is_inference_mode_enabled(), *versions)
        if role in self.weight_cache:
            cached_key, weight = self.weight_cache[role]
            if cached_key == key:
                return weight
        with torch.no_grad():
            weight = quantizer(self.latent(role))
        self.weight_cache[role] = (key, weight)
        return weight


def keep_weights(net: nn.Module, *, keep: bool) -> None:
    """Keep quantized weights from one forward pass to the next, or free them and stop keeping them.

    A weight is quantized again if torch's version counter has changed. The counter misses changes
    through `.data`, by a fused optimizer or by a collective operation: call this function again
    after such changes.

    Args:
        net: the model.
        keep: True = keep weights; False = free them and stop.
    """
    for module in net.modules():
        if isinstance(module, QuantModule):
            module.weight_cache = {} if keep else None


@contextlib.contextmanager
def cached_weights(net: nn.Module) -> Generator[None]:
    """Keep quantized weights in a `with` block (see `keep_weights`); then stop keeping weights."""
    keep_weights(net, keep=True)
    try:
        yield
    finally:
        keep_weights(net, keep=False)
