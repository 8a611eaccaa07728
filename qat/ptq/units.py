"""What post-training quantization fits piece by piece: blocks, and quantized layers outside of them, in the order in which they run."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.blocks import CONTAINER, find_blocks
from qat.model.sites import Site, iter_quantizers
from qat.ptq.block_cache import GIB, PrefixCache, trace, verified
from qat.ptq.patching import Enough

# Memory for what the modules in front of a unit gave back, of each of the two nets.
_CACHE_BYTES = 4 * GIB


@dataclass(frozen=True)
class Unit:
    """A block, or a quantized layer outside of the blocks.

    Attributes:
        name: path in the net.
        layers: sites of the quantized weights inside, in the order in which they run.
    """

    name: str
    layers: tuple[Site, ...]


class Runner:
    """Runs a net from one of its units on, over fixed batches of images.

    Args:
        net: in eval mode.
        units: names of the modules to run from.
        batches: images (B, C, H, W) each, on the device of the net.
    """

    def __init__(self, net: nn.Module, units: Sequence[str], batches: Sequence[Tensor]) -> None:
        modules = dict(net.named_modules())
        traced = verified(net, trace(net, {name: modules[name] for name in units}, batches[0][:1]), batches[0][:2])
        self.net, self.modules, self.batches, self.order = net, modules, batches, traced.order
        self._cache = PrefixCache(net, traced, batches, _CACHE_BYTES)

    @contextlib.contextmanager
    def at(self, unit: str) -> Generator[None]:
        """While it lasts, `self(i)` begins at a unit; what is in front of it must not change meanwhile."""
        self._cache.clear()
        with self._cache.replaying(unit):
            yield

    def __call__(self, i: int) -> Any:
        """What the net makes of batch `i`."""
        self._cache.at = i
        return self.net(self.batches[i])

    @torch.no_grad()
    def output(self, module: str, i: int) -> tuple[tuple[Any, ...], Any]:
        """Positional arguments and output of a module for batch `i`; what follows it does not run."""
        seen: list[tuple[tuple[Any, ...], Any]] = []

        def look(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append((args, output))
            raise Enough

        handle = self.modules[module].register_forward_hook(look)
        try:
            with contextlib.suppress(Enough):
                self(i)
        finally:
            handle.remove()
        return seen[0]


def find_units(net: nn.Module, image: Tensor, setting: str) -> list[Unit]:
    """The units of a net with quantized weights, in the order in which they run.

    Args:
        net: converted; its scales are filled.
        image: (1, C, H, W), on the device of the net.
        setting: what asks for them, for messages.

    Raises:
        UsageError: the net has no blocks, or none with a quantized weight.
    """
    blocks = find_blocks(net)
    layers = [s for s in iter_quantizers(net) if s.role == "weight" and not s.quantizer.is_float]
    if not any(name.startswith(f"{block}.") for block in blocks for name in (s.name for s in layers)):
        raise UsageError(f"{setting}: this net has no blocks with quantized weights; they are looked for in modules called {CONTAINER!r}")
    places = {site.name: next((b for b in blocks if site.name.startswith(f"{b}.")), site.layer) for site in layers}
    ran = trace(net, {}, image)
    once = [site for site in layers if site.layer in ran.once and places[site.name] in ran.once]
    inside: dict[str, list[Site]] = {}
    for site in sorted(once, key=lambda site: ran.order[site.layer]):
        inside.setdefault(places[site.name], []).append(site)
    return [Unit(name, tuple(sites)) for name, sites in sorted(inside.items(), key=lambda entry: ran.order[entry[0]])]


def check_finite(value: Tensor, unit: str, setting: str) -> None:
    """Raise `UsageError` if what enters or leaves a unit holds NaN or infinity."""
    if not bool(value.isfinite().all()):
        raise UsageError(
            f"{setting}: the activations of {unit} hold NaN or infinity; look at the weights of ckpt and at data.mean, data.std"
        )
