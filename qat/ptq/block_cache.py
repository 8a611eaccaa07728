"""Run a net from a block on: what comes before the block is remembered from an earlier forward.

While the scales of one block change, nothing in front of it does. A module in front of it gives back what it gave before, so the
forward of the net itself, whatever it is, goes on behind it: no family of nets is known here.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.ptq.patching import Enough, Forward, patched
from qat.quantizers import Quantizer
from qat.utils.probing import probing

GIB = 2**30
log = logging.getLogger(__name__)


def addresses(value: Any) -> Iterable[int]:
    """Addresses of the memory behind all tensors in a value."""
    return (t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor))


class Moment(NamedTuple):
    """A point of a forward.

    Attributes:
        when: counts upwards.
        returned: the outermost modules that have returned by then, in their order.
    """

    when: int
    returned: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """The order in which a net runs.

    Attributes:
        order: number of the first call of each module, by name.
        prefixes: per block, the outermost modules that have returned when it begins, in their order, or later on, see `entering`;
            empty for a block that runs more than once.
        entries: per block, a module that begins when those of its prefix have returned.
        memory: what each module gives back for one image: address and bytes of each piece.
        keeps_shape: modules that map a tensor to one of the same shape.
        once: modules that run once.
        readers: the places where what a module gave back is read: names of the modules that are running then, outermost first.
        moments: when a quantizer begins, or one of its tensors is read for the first time.
    """

    order: Mapping[str, int]
    prefixes: Mapping[str, tuple[str, ...]]
    entries: Mapping[str, str]
    memory: Mapping[str, frozenset[tuple[int, int]]]
    keeps_shape: frozenset[str]
    once: frozenset[str]
    readers: Mapping[str, frozenset[tuple[str, ...]]]
    moments: Mapping[str, Moment]

    def needed(self, block: str) -> tuple[str, ...]:
        """Modules of a prefix whose output is wanted when the net goes on behind it.

        What is read inside modules of the prefix alone is not, unless its shape cannot be had from its input: others may look at it.
        """
        prefix = self.prefixes[block]
        inside = set(prefix)
        return tuple(n for n in prefix if n not in self.keeps_shape or any(inside.isdisjoint(place) for place in self.readers[n]))

    def bytes_for(self, blocks: Iterable[str]) -> int:
        """Memory for everything that these blocks need, for one image."""
        return sum(size for _, size in frozenset().union(*(self.memory[name] for block in blocks for name in self.needed(block))))

    def entering(self, sites: Mapping[str, Sequence[str]], room: float = float("inf")) -> Trace:
        """The trace whose prefixes reach to where the first of some quantizers begins, or one of its tensors is read.

        Args:
            sites: names of the quantizers that will change, per block. One that runs more than once leaves the block's prefix as it is.
            room: bytes for one image. Where what all these blocks need takes more, the trace stays as it is: to make some of it again in
                every pass costs more than is gained.
        """
        own = {block: names for block, names in sites.items() if self.prefixes[block] and self.once.issuperset(names)}
        found = {block: min(self.moments[name] for name in names).returned for block, names in own.items()}
        prefixes = {block: tuple(name for name in returned if name in self.once) for block, returned in found.items()}
        entries = {block: min(names, key=self.order.__getitem__) for block, names in own.items()}
        inner = replace(self, prefixes={**self.prefixes, **prefixes}, entries={**self.entries, **entries})
        return inner if inner.bytes_for(sites) <= room else self


class _Tracer(TorchDispatchMode):
    """Looks on while a net runs: at modules by hooks, and at every operation."""

    def __init__(self, net: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = blocks
        self.calls: Counter[str] = Counter()
        self.order: dict[str, int] = {}
        self.prefixes: dict[str, tuple[str, ...]] = {}
        self.memory: dict[str, frozenset[tuple[int, int]]] = {}
        self.keeps_shape: set[str] = set()
        self.readers: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        self.moments: dict[str, Moment] = {}
        self._done: list[str] = []
        self._open: list[tuple[str, int]] = []
        self._ticks = itertools.count()
        self._makers: defaultdict[int, set[str]] = defaultdict(set)
        self._alive: list[Any] = []  # no address is given to another tensor while one of these has it
        self._quantizers = {name for name, module in net.named_modules() if isinstance(module, Quantizer)}
        self._holders: defaultdict[int, set[str]] = defaultdict(set)
        for name in self._quantizers:
            module = net.get_submodule(name)
            for address in addresses([*module.parameters(), *module.buffers()]):
                self._holders[address].add(name)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        place = tuple(name for name, _ in self._open)
        for address in set(addresses((args, kwargs))):
            for name in self._makers.get(address, ()):
                self.readers[name].add(place)
            for name in self._holders.get(address, ()):
                self._begin(name)
        return func(*args, **(kwargs or {}))

    def _begin(self, quantizer: str) -> None:
        self.moments.setdefault(quantizer, Moment(next(self._ticks), tuple(self._done)))

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls[name] += 1
            self.order.setdefault(name, len(self.order))
            self._open.append((name, len(self._done)))
            if name in self._quantizers:
                self._begin(name)
            if name in self.blocks:
                self.prefixes[name] = tuple(self._done)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # What ran inside is told by the module around it.
            del self._done[self._open.pop()[1] :]
            self._done.append(name)
            self._alive.append(output)
            pieces = [t.untyped_storage() for t in tree_leaves(output) if isinstance(t, Tensor)]
            self.memory[name] = frozenset((piece.data_ptr(), piece.nbytes()) for piece in pieces)
            for address, _ in self.memory[name]:
                self._makers[address].add(name)
            if args and isinstance(output, Tensor) and isinstance(args[0], Tensor) and output.shape == args[0].shape:
                self.keeps_shape.add(name)

        return hook


def trace(net: nn.Module, blocks: Mapping[str, nn.Module], image: Tensor) -> Trace:
    """Run one image (1, C, H, W) through the net and look on."""
    tracer = _Tracer(net, blocks)
    hooks = []
    for name, module in net.named_modules():
        hooks += [module.register_forward_pre_hook(tracer.enter(name)), module.register_forward_hook(tracer.leave(name))]
    with probing(net, hooks), tracer:
        net(image)
    once = frozenset(name for name, n in tracer.calls.items() if n == 1)
    prefixes = {b: tuple(n for n in p if n in once) if b in once else () for b, p in tracer.prefixes.items()}
    readers = {name: frozenset(tracer.readers[name]) for name in tracer.order}
    entries = {block: block for block in prefixes}
    return Trace(tracer.order, prefixes, entries, tracer.memory, frozenset(tracer.keeps_shape), once, readers, tracer.moments)


def verified(net: nn.Module, traced: Trace, images: Tensor, inner: Trace | None = None) -> Trace:
    """The trace without the prefixes from whose end the net does not go on to the same output, bit for bit.

    A net may use what it saw in front of a block in a way that cannot be seen from outside; such a block is run from the start.

    Args:
        net: quantized, in eval mode.
        traced: of the net.
        images: (n, C, H, W), a micro-batch.
        inner: with longer prefixes, which are taken where they hold; see `Trace.entering`.
    """
    chosen: dict[str, Trace | None] = {}
    with torch.no_grad():
        whole = net(images)
        caches = [PrefixCache(net, candidate, [images], float("inf")) for candidate in (inner or traced, traced)]
        for block in reversed(list(traced.prefixes)):
            chosen[block] = next((cache.trace for cache in caches if _leads_to(whole, images, cache, block)), None)
    for block in (name for name, found in chosen.items() if found is None):
        log.warning("search: %s cannot be run from its input; its candidates take whole forwards", block)
    prefixes = {block: () if (found := chosen[block]) is None else found.prefixes[block] for block in traced.prefixes}
    return replace(traced, prefixes=prefixes, entries={block: (chosen[block] or traced).entries[block] for block in traced.prefixes})


def _leads_to(outputs: Any, images: Tensor, cache: PrefixCache, block: str) -> bool:
    with cache.replaying(block):
        pairs = zip(tree_leaves(cache.net(images)), tree_leaves(outputs), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


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

    def hold(self, block: str) -> None:
        """Make sure that `block` can be run from; where it is not held, with as many of those in front of it as fit."""
        if block in self.held:
            return
        self.clear()
        held = self._fitting(block)
        self._kept = {name: [] for entry in held for name in self.trace.needed(entry)}
        # Behind the hooks that change what a module gives, as those of a block's matrix do.
        recorders = [self.modules[name].register_forward_hook(_recording(kept)) for name, kept in self._kept.items()]
        with probing(self.net, recorders), patched({self.modules[self.trace.entries[block]]: _arrive}):
            for images in self.micro_batches:
                with contextlib.suppress(Enough):
                    self.net(images)
        self.held = held

    def _fitting(self, block: str) -> tuple[str, ...]:
        images = sum(len(batch) for batch in self.micro_batches)
        names = [name for name in self.trace.order if name in self.trace.prefixes]
        fitting: list[str] = []
        for name in reversed(names[: names.index(block) + 1]):
            if fitting and self.trace.bytes_for([*fitting, name]) * images > self.limit:
                break
            fitting.append(name)
        return tuple(fitting)

    @contextlib.contextmanager
    def replaying(self, block: str) -> Generator[None]:
        """While it lasts, a forward of the micro-batch `at` runs from `block` on."""
        self.hold(block)
        needed = set(self.trace.needed(block))
        stubs = {self.modules[n]: self._playing(n) if n in needed else _pass_on for n in self.trace.prefixes[block]}
        with patched(stubs), _without_hooks(stubs):
            yield

    def _playing(self, name: str) -> Forward:
        kept = self._kept[name]
        return lambda *args, **kwargs: kept[self.at]


def _recording(kept: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, args, output: kept.append(output)


@contextlib.contextmanager
def _without_hooks(modules: Iterable[nn.Module]) -> Generator[None]:
    """What these modules play back has been through their hooks already."""
    before = {module: module._forward_hooks for module in modules}
    try:
        for module in before:
            module._forward_hooks = OrderedDict()
        yield
    finally:
        for module, hooks in before.items():
            module._forward_hooks = hooks


def _arrive(*args: Any, **kwargs: Any) -> Any:
    raise Enough


def _pass_on(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x
