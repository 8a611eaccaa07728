"""Run a net from one of its modules on: what comes before it is remembered from an earlier forward.

The module gets the arguments that it got in that forward. Modules before it give back what they gave, blocks before it what they get: what
they gave would take memory for each of them. So the net's own forward goes on from there, and no family of nets is known here.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.errors import UsageError
from qat.model.sites import CONTAINER, Site, find_blocks, iter_quantizers
from qat.utils.probing import probing

Forward = Callable[..., Any]
# A scale divides; calibration keeps the same distance from zero.
LOWEST_SCALE = torch.finfo(torch.float32).eps
log = logging.getLogger(__name__)


class StopForward(Exception):
    """Ends a forward that has reached what it was run for; callers that run it suppress this."""


@contextlib.contextmanager
def patched(forwards: Mapping[nn.Module, Forward]) -> Generator[None]:
    """Each module calls the function given; hooks run as before. Afterwards each is as it was."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, was in before.items():
            if was is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = was


class RunOrder:
    """The order in which the modules of a net run.

    Args:
        net: converted, its scales are filled.
        image: (1, C, H, W), on the device of the net.

    Attributes:
        before: per module that runs, in the order of their first calls: the outermost modules that have returned by then.
        place: number of the first call of each module.
        once: modules that run once.
        keeps_shape: modules whose output has the shape of their input.
    """

    def __init__(self, net: nn.Module, image: Tensor) -> None:
        self.before: dict[str, tuple[str, ...]] = {}
        self.keeps_shape: set[str] = set()
        calls: Counter[str] = Counter()
        returned: list[str] = []
        starts: list[int] = []

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                calls[name] += 1
                self.before.setdefault(name, tuple(returned))
                starts.append(len(returned))

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                del returned[starts.pop() :]
                returned.append(name)
                if (
                    args
                    and isinstance(output, Tensor)
                    and isinstance(args[0], Tensor)
                    and output.shape == args[0].shape
                ):
                    self.keeps_shape.add(name)

            return hook

        hooks = [
            module.register_forward_pre_hook(enter(name)) for name, module in net.named_modules()
        ]
        hooks += [module.register_forward_hook(leave(name)) for name, module in net.named_modules()]
        with probing(net, hooks):
            net(image)
        self.place = {name: number for number, name in enumerate(self.before)}
        self.once = {name for name, n in calls.items() if n == 1}


class Runner:
    """Runs a net from one of some modules on, over fixed batches of images.

    Args:
        net: in eval mode.
        entries: names of these modules; with each, itself or modules inside: what has run in it when the first of them begins is remembered
            too.
        batches: images (B, C, H, W) each, on the device of the net.
        limit: bytes for what is remembered; of one module it is always all. As many modules before it as fit are remembered with it.
        to_the_end: the output of the net is wanted, not only that of the module.
    """

    def __init__(
        self,
        net: nn.Module,
        entries: Mapping[str, Sequence[str]],
        batches: Sequence[Tensor],
        limit: float = 0,
        *,
        to_the_end: bool = False,
    ) -> None:
        self.net, self.batches, self.limit = net, batches, limit
        self.modules = dict(net.named_modules())
        self.order = RunOrder(net, batches[0][:1])
        place = self.order.place
        self.entries = {
            name: min(entries[name], key=lambda n: place.get(n, len(place)))
            for name in place
            if name in entries
        }
        self._at = 0
        self.forget()
        self._sizes: dict[str, dict[int, float]] = {}
        self._whole = {
            name
            for name, entry in self.entries.items()
            if not self.order.once.issuperset({name, entry})
        }
        self._check(to_the_end=to_the_end)

    def _check(self, *, to_the_end: bool) -> None:
        """Find the modules from which the net does not go on to the same output, bit for bit: what is before them is read again later."""
        given, self.batches = self.batches, [self.batches[0][:2]]
        limit, self.limit = self.limit, float("inf")
        names = [name for name in self.entries if name not in self._whole]

        def outcome(name: str) -> list[Any]:
            return tree_leaves(self(0) if to_the_end else self.output(name, 0)[1])

        with probing(self.net, ()):
            expected = {name: outcome(name) for name in names}
            for name in reversed(names):
                with self.at(name):
                    if not all(map(torch.equal, outcome(name), expected[name])):
                        log.warning(
                            "%s cannot run on its own input; the whole model runs instead", name
                        )
                        self._whole.add(name)
                remembered = [self._inputs[name], *(self._outputs[n] for n in self._needed(name))]
                storages = [
                    t.untyped_storage() for t in tree_leaves(remembered) if isinstance(t, Tensor)
                ]
                self._sizes[name] = {
                    s.data_ptr(): s.nbytes() / len(self.batches[0]) for s in storages
                }
        self.batches, self.limit = given, limit
        self.forget()

    def forget(self) -> None:
        """Nothing is remembered any more: what comes before the modules has changed."""
        self._inputs: dict[str, list[Any]] = {}
        self._outputs: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def at(self, name: str) -> Generator[None]:
        """While it lasts, `self(i)` begins at a module; what is before it must not change meanwhile."""
        if name in self._whole:
            yield
            return
        if name not in self._inputs:
            self._remember(name)
        stubs = {
            self.modules[n]: self._played(n)
            for n in self.order.before[self.entries[name]]
            if n in self.order.once
        }
        inputs = self.modules[name].register_forward_pre_hook(
            lambda *_: self._inputs[name][self._at], with_kwargs=True, prepend=True
        )
        try:
            with patched(stubs):
                yield
        finally:
            inputs.remove()

    def __call__(self, i: int) -> Any:
        """What the net makes of batch `i`."""
        self._at = i
        return self.net(self.batches[i])

    def output(self, module: str, i: int) -> tuple[tuple[Any, ...], Any]:
        """Positional arguments and output of a module for batch `i`; what follows it does not run."""
        seen: list[tuple[tuple[Any, ...], Any]] = []

        def look(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append((args, output))
            raise StopForward

        handle = self.modules[module].register_forward_hook(look)
        try:
            with contextlib.suppress(StopForward):
                self(i)
        finally:
            handle.remove()
        return seen[0]

    def _needed(self, name: str) -> list[str]:
        """Modules before `name`, and in it before its entry, whose outputs are wanted: all but other entries that keep the shape."""
        before = [n for n in self.order.before[self.entries[name]] if n in self.order.once]
        return [n for n in before if n not in self.entries or n not in self.order.keeps_shape]

    def _played(self, name: str) -> Callable[..., Any]:
        kept = self._outputs.get(name)
        return (
            (lambda x, *args, **kwargs: x)
            if kept is None
            else (lambda *args, **kwargs: kept[self._at])
        )

    def _remember(self, name: str) -> None:
        """One forward of all batches up to the entry of `name`; modules before it are remembered with it as far as memory goes."""
        held: list[str] = []
        memory: dict[int, float] = {}
        images = sum(len(batch) for batch in self.batches)
        names = [n for n in self.entries if n not in self._whole]
        for n in reversed(names[: names.index(name) + 1]):
            memory |= self._sizes.get(n, {})
            if held and sum(memory.values()) * images > self.limit:
                break
            held.append(n)
        self._inputs = {n: [] for n in held}
        self._outputs = {n: [] for block in held for n in self._needed(block)}

        def stop(*_: Any) -> None:
            raise StopForward

        hooks = [
            self.modules[n].register_forward_pre_hook(
                lambda _, *given, kept=kept: kept.append(given), with_kwargs=True
            )
            for n, kept in self._inputs.items()
        ]
        hooks += [
            self.modules[n].register_forward_hook(
                lambda _, args, output, kept=kept: kept.append(output)
            )
            for n, kept in self._outputs.items()
        ]
        with probing(
            self.net, [*hooks, self.modules[self.entries[name]].register_forward_pre_hook(stop)]
        ):
            for batch in self.batches:
                with contextlib.suppress(StopForward):
                    self.net(batch)


def find_units(
    net: nn.Module, reference: nn.Module, batches: Sequence[Tensor], setting: str
) -> tuple[dict[str, list[Site]], Runner, Runner]:
    """What is fitted piece by piece: blocks, and quantized layers outside of them, in the order in which they run.

    Args:
        net: converted; its scales are filled.
        reference: the float net that it was made of.
        batches: images (B, C, H, W) each, on the device of the nets.
        setting: what asks for them, for messages.

    Returns:
        Per block or layer the sites of its quantized weights, in the order in which they run; then what runs them in either net.

    Raises:
        UsageError: the net has no blocks, or none with a quantized weight; or the reference is quantized.
    """
    if not all(site.quantizer.is_float for site in iter_quantizers(reference)):
        raise UsageError(
            f"{setting}: the reference is quantized; must be a copy of the model made before qat.convert"
        )
    blocks = find_blocks(net)
    layers = [s for s in iter_quantizers(net) if s.role == "weight" and not s.quantizer.is_float]
    unit_of = {
        site.name: next((b for b in blocks if site.name.startswith(f"{b}.")), site.layer)
        for site in layers
    }
    if blocks.keys().isdisjoint(unit_of.values()):
        raise UsageError(
            f"{setting}: this model has no blocks with quantized weights in modules called {CONTAINER!r}"
        )
    ran = RunOrder(net, batches[0][:1])
    units: dict[str, list[Site]] = {}
    for site in sorted(
        (s for s in layers if {s.layer, unit_of[s.name]} <= ran.once),
        key=lambda s: ran.place[s.layer],
    ):
        units.setdefault(unit_of[site.name], []).append(site)
    units = {name: units[name] for name in ran.place if name in units}
    entries = {name: [name] for name in units}
    return units, Runner(net, entries, batches), Runner(reference, entries, batches)


def check_finite(value: Tensor, unit: str, setting: str) -> None:
    """Raise `UsageError` if what enters or leaves a unit holds NaN or infinity."""
    if not bool(value.isfinite().all()):
        raise UsageError(
            f"{setting}: the activations of {unit} hold NaN or infinity; check the weights of ckpt, data.mean and data.std"
        )
