"""Run a net from a block on: what comes before the block is remembered from an earlier forward.

While the scales of one block change, nothing in front of it does. A module in front of it gives back what it gave before, so the
forward of the net itself, whatever it is, goes on behind it: no family of nets is known here.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.probing import probing
from qat.ptq.patching import Forward, patched

GIB = 2**30
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """The order in which a net runs.

    Attributes:
        order: number of the first call of each module, by name.
        prefixes: per block, the outermost modules that have returned when it begins, in their order; empty for a block that runs
            more than once.
        sizes: bytes that each module of a prefix gives back for one image.
        keeps_shape: blocks that map a tensor to one of the same shape.
    """

    order: Mapping[str, int]
    prefixes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    keeps_shape: frozenset[str]


@dataclass
class _Tracer:
    blocks: Mapping[str, nn.Module]
    calls: Counter[str] = field(default_factory=Counter)
    order: dict[str, int] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    prefixes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    keeps_shape: set[str] = field(default_factory=set)

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls[name] += 1
            self.order.setdefault(name, len(self.order))
            self.open.append(len(self.done))
            if name in self.blocks:
                self.prefixes[name] = tuple(self.done)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # What ran inside is told by the module around it.
            del self.done[self.open.pop() :]
            self.done.append(name)
            self.sizes[name] = sum(t.nbytes for t in _tensors(output))
            if args and isinstance(output, Tensor) and isinstance(args[0], Tensor) and output.shape == args[0].shape:
                self.keeps_shape.add(name)

        return hook


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def trace(net: nn.Module, blocks: Mapping[str, nn.Module], image: Tensor) -> Trace:
    """Run one image (1, C, H, W) through the net and look on."""
    tracer = _Tracer(blocks)
    hooks = []
    for name, module in net.named_modules():
        hooks += [module.register_forward_pre_hook(tracer.enter(name)), module.register_forward_hook(tracer.leave(name))]
    with probing(net, hooks):
        net(image)
    once = {name for name, n in tracer.calls.items() if n == 1}
    prefixes = {b: tuple(n for n in p if n in once) if b in once else () for b, p in tracer.prefixes.items()}
    used = {name for prefix in prefixes.values() for name in prefix}
    return Trace(tracer.order, prefixes, {n: tracer.sizes[n] for n in used}, frozenset(tracer.keeps_shape & set(blocks)))


def verified(net: nn.Module, traced: Trace, images: Tensor) -> Trace:
    """The trace without the prefixes from whose end the net does not go on to the same logits, bit for bit.

    A net may use what it saw in front of a block in a way that cannot be seen from outside; such a block is run from the start.

    Args:
        net: quantized, in eval mode.
        traced: of the net.
        images: (n, C, H, W), a micro-batch.
    """
    cache = PrefixCache(net, traced, [images], float("inf"))
    sound = {}
    with torch.no_grad():
        whole = net(images)
        for block in reversed(list(traced.prefixes)):
            with cache.replaying(block):
                sound[block] = torch.equal(net(images), whole)
    for block in (name for name, same in sound.items() if not same):
        log.warning("search: %s cannot be run from its input; its candidates take whole forwards", block)
    return replace(traced, prefixes={b: p if sound[b] else () for b, p in traced.prefixes.items()})


class _Arrived(Exception):
    """Ends a forward at the block that it was to reach."""


class PrefixCache:
    """What the modules in front of the blocks gave back, for every micro-batch.

    It holds as many blocks as its memory allows, at least one: those that a search in reverse order comes to next.

    Args:
        net: whose forward is run.
        traced: how it runs.
        micro_batches: images (n, C, H, W) each, in the order in which they are asked for.
        limit: bytes.

    Attributes:
        at: index of the micro-batch that is run next.
    """

    def __init__(self, net: nn.Module, traced: Trace, micro_batches: Sequence[Tensor], limit: float) -> None:
        self.net = net
        self.modules = dict(net.named_modules())
        self.trace = traced
        self.micro_batches = micro_batches
        self.limit = limit
        self.at = 0
        self.held: tuple[str, ...] = ()
        self._kept: dict[str, list[Any]] = {}

    def clear(self) -> None:
        """Forget everything: scales of a block that is held, or in front of it, have changed."""
        self.held = ()
        self._kept = {}

    def needed(self, block: str) -> tuple[str, ...]:
        """Modules whose output is wanted when the net goes on from `block`; of a chain of blocks only the last."""
        prefix = self.trace.prefixes[block]
        return (*(name for name in prefix[:-1] if name not in self.trace.keeps_shape), *prefix[-1:])

    def hold(self, block: str) -> None:
        """Make sure that `block` can be run from; where it is not held, with as many of those in front of it as fit."""
        if block in self.held:
            return
        self.clear()
        held = self._fitting(block)
        self._kept = {name: [] for entry in held for name in self.needed(entry)}
        recorders = {self.modules[name]: self._recording(name) for name in self._kept}
        with torch.no_grad(), patched({**recorders, self.modules[block]: _arrive}):
            for images in self.micro_batches:
                with contextlib.suppress(_Arrived):
                    self.net(images)
        self.held = held

    def _fitting(self, block: str) -> tuple[str, ...]:
        images = sum(len(batch) for batch in self.micro_batches)
        names = [name for name in self.trace.order if name in self.trace.prefixes]
        fitting: list[str] = []
        wanted: set[str] = set()
        for name in reversed(names[: names.index(block) + 1]):
            wanted |= set(self.needed(name))
            if fitting and sum(self.trace.sizes[n] for n in wanted) * images > self.limit:
                break
            fitting.append(name)
        return tuple(fitting)

    def _recording(self, name: str) -> Forward:
        original, kept = self.modules[name].forward, self._kept[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            kept.append(output)
            return output

        return forward

    @contextlib.contextmanager
    def replaying(self, block: str) -> Generator[None]:
        """While it lasts, a forward of the micro-batch `at` runs from `block` on."""
        self.hold(block)
        needed = set(self.needed(block))
        stubs = {self.modules[n]: self._playing(n) if n in needed else _pass_on for n in self.trace.prefixes[block]}
        with patched(stubs):
            yield

    def _playing(self, name: str) -> Forward:
        kept = self._kept[name]
        return lambda *args, **kwargs: kept[self.at]


def _arrive(*args: Any, **kwargs: Any) -> Any:
    raise _Arrived


def _pass_on(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x
