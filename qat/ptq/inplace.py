"""Activation quantizers that write over their input, where nobody reads it any more.

A quantizer that makes a new tensor of a large activation spends most of its time on memory that is not in the processor's caches.
Which inputs are read once only is seen by looking at every operation of one forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.functional.affine import fake_quantize_affine_
from qat.model.sites import Site, iter_quantizers
from qat.ptq.fused import WORTH_COMPILING, Kernel, compiled_kernel, fused_
from qat.ptq.patching import Forward
from qat.quantizers import Affine
from qat.utils.probing import probing


def addresses(value: Any) -> Iterable[int]:
    """Addresses of the memory behind all tensors in a value."""
    return (t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor))


class _Readers(TorchDispatchMode):
    """Watches who reads the input of a quantizer behind it.

    Attributes:
        spoiled: names of quantizers whose input is read again, or belongs to somebody.
        entries: of the inputs of all quantizers.
    """

    def __init__(self, owned: Iterable[int]) -> None:
        super().__init__()
        self.owned = set(owned)
        self.spoiled: set[str] = set()
        self.entries = 0
        self._inputs: dict[int, set[str]] = {}
        self._alive: list[Tensor] = []  # no address is given to another tensor while one of these has it
        self._inside = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self._inside:
            for address in addresses((args, kwargs)):
                self.spoiled |= self._inputs.get(address, set())
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A quantizer begins; of several that read the same memory only the last may write over it."""
        for address in addresses(args):
            self.spoiled |= self._inputs.get(address, set())
        self._inside += 1

    def leave(self, name: str) -> Callable[..., None]:
        """Hook for when the quantizer `name` has returned."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            self._inside -= 1
            self.entries += args[0].numel()
            (address,) = addresses(args[0])
            self._alive.append(args[0])
            self._inputs.setdefault(address, set()).add(name)
            if address in self.owned or 0 in args[0].stride():
                self.spoiled.add(name)

        return hook

    def own(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of modules whose output somebody keeps."""
        self.owned |= set(addresses(output))
        self._alive += [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def overwriting(net: nn.Module, kept: Iterable[str], images: Tensor, passes: float = 0) -> dict[nn.Module, Forward]:
    """A forward that writes over its input, for every quantizer of an activation that may; bit-equal to its own.

    Args:
        net: quantized.
        kept: modules whose output somebody keeps, by name.
        images: (n, C, H, W), n > 1.
        passes: images that will go through the whole net; so many that it is worth it, and the loops are compiled (on a CPU).
    """
    sites = [s for s in iter_quantizers(net) if not s.is_weight and _plain(s)]
    readers = _Readers(addresses([images, *net.parameters(), *net.buffers()]))
    modules: Mapping[str, nn.Module] = dict(net.named_modules())
    hooks = [modules[name].register_forward_hook(readers.own) for name in kept]
    for site in sites:
        hooks += [site.quantizer.register_forward_pre_hook(readers.enter), site.quantizer.register_forward_hook(readers.leave(site.name))]
    with probing(net, hooks), readers:
        net(images)
    worth = images.device.type == "cpu" and readers.entries / len(images) * passes >= WORTH_COMPILING
    kernel = compiled_kernel() if worth else None
    return {site.quantizer: _overwriting(site.quantizer, kernel) for site in sites if site.name not in readers.spoiled}


def _plain(site: Site) -> bool:
    return type(site.quantizer).forward is Affine.forward and not site.quantizer.spec.bias_correction


def _overwriting(quantizer: Any, kernel: Kernel | None) -> Forward:
    original = quantizer.forward
    over = fake_quantize_affine_ if kernel is None else functools.partial(fused_, kernel)

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            result: Tensor = original(x)
            return result
        return over(x, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, quantizer.axis)

    return forward
