"""Run only the part of a net from a given module onwards, with cached results of earlier modules.

The given module gets the arguments that it got in an earlier forward. Earlier blocks that keep the
shape of their input return this input, because caching the output of every block would take too
much memory; other earlier modules return their cached outputs. In this way, the net's own forward
continues from the given module. If this changes the output, the whole net runs.
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
from torch.utils.hooks import RemovableHandle

from qat.errors import UsageError
from qat.model.sites import BLOCKS, Site, find_blocks, iter_quantizers
from qat.utils.probing import probing

Forward = Callable[..., Any]
# The smallest learned or searched scale; scales must not be zero, because they are divisors.
MIN_SCALE = torch.finfo(torch.float32).eps
log = logging.getLogger(__name__)


class StopForward(Exception):
    """Ends a forward early; callers suppress the exception."""


@contextlib.contextmanager
def patch_forwards(forwards: Mapping[nn.Module, Forward]) -> Generator[None]:
    """Replace `forward` of the given modules while this block runs; hooks still run."""
    originals = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, original in originals.items():
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original


def _keeps_shape(args: tuple[Any, ...], output: Any) -> bool:
    """True if a module maps a tensor to a tensor of the same shape."""
    if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return False
    return output.shape == args[0].shape


class RunOrder:
    """The order in which the modules of a net run.

    Args:
        net: a float net, or a converted net whose scales are set.
        image: (1, C, H, W), on the device of the net.

    Attributes:
        returned_before: maps each module that runs, in the order of first calls, to the modules
            that returned before its first call, without modules inside another one of them.
        position: index of the first call of each module.
        called_once: modules that run only once in a forward.
        shape_preserving: modules whose output has the shape of their input.
    """

    def __init__(self, net: nn.Module, image: Tensor) -> None:
        self.returned_before: dict[str, tuple[str, ...]] = {}
        self.shape_preserving: set[str] = set()
        calls: Counter[str] = Counter()
        returned_modules: list[str] = []
        num_returned_on_entry: list[int] = []

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                calls[name] += 1
                self.returned_before.setdefault(name, tuple(returned_modules))
                num_returned_on_entry.append(len(returned_modules))

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                # In the list, this module replaces the modules inside it.
                del returned_modules[num_returned_on_entry.pop() :]
                returned_modules.append(name)
                if _keeps_shape(args, output):
                    self.shape_preserving.add(name)

            return hook

        hooks: list[RemovableHandle] = []
        for name, module in net.named_modules():
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(leave(name)))
        with probing(net, hooks):
            net(image)
        self.position = {name: index for index, name in enumerate(self.returned_before)}
        self.called_once = {name for name, count in calls.items() if count == 1}


class Runner:
    """Runs the part of a net from a chosen module onwards, on fixed batches of images.

    Args:
        net: the net, in eval mode.
        entry_candidates: for each module to run from, candidates for its entry: the module itself,
            or modules inside it. The candidate that runs first is the entry; outputs of modules
            that return before the entry runs may be cached, even within the module to run from.
        batches: images (B, C, H, W) each, on the device of the net.
        cache_bytes: size of the cache in bytes. The cache always covers one module, and as many
            modules before this module as fit.
        needs_net_output: True if callers need the output of the net, not only of the chosen module.
    """

    def __init__(
        self,
        net: nn.Module,
        entry_candidates: Mapping[str, Sequence[str]],
        batches: Sequence[Tensor],
        cache_bytes: float = 0,
        *,
        needs_net_output: bool = False,
    ) -> None:
        self.net = net
        self.batches = batches
        self.cache_bytes = cache_bytes
        self.modules = dict(net.named_modules())
        self.order = RunOrder(net, batches[0][:1])
        # The entry of each module, in the order in which the modules run.
        self.entries: dict[str, str] = {}
        for name in self.order.position:
            if name in entry_candidates:
                self.entries[name] = min(entry_candidates[name], key=self._position)
        self._batch_index = 0
        self.clear_cache()
        # For each module, the bytes per image of the tensors that are cached for it, by the address
        # of the tensor's storage.
        self._sizes: dict[str, dict[int, float]] = {}
        # Modules from which the net cannot continue; for these, the whole net runs.
        self._uncacheable: set[str] = set()
        for name, entry in self.entries.items():
            if not self.order.called_once.issuperset({name, entry}):
                self._uncacheable.add(name)
        self._check_outputs(needs_net_output=needs_net_output)

    def _position(self, name: str) -> int:
        """Position of a module in the run order; a module that does not run comes last."""
        return self.order.position.get(name, len(self.order.position))

    def _check_outputs(self, *, needs_net_output: bool) -> None:
        """Find the modules at which a run cannot start, because this would change the output.

        With `needs_net_output`, the output of the net is compared with that of a full run, else the
        output of the module. This output may change if the net later reads outputs of earlier
        blocks.
        """
        all_batches = self.batches
        cache_bytes = self.cache_bytes
        self.batches = [all_batches[0][:2]]
        self.cache_bytes = float("inf")
        names = [name for name in self.entries if name not in self._uncacheable]

        def compute_output(name: str) -> list[Tensor]:
            output = self(0) if needs_net_output else self.output(name, 0)[1]
            return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

        with probing(self.net, ()):
            expected_outputs = {name: compute_output(name) for name in names}
            # Begin with the last module: this fills the cache for all modules at once.
            for name in reversed(names):
                with self.at(name):
                    output = compute_output(name)
                    if not all(map(torch.equal, output, expected_outputs[name])):
                        log.warning(
                            "%s: the output is not the same when the model starts there; the "
                            "whole model runs instead",
                            name,
                        )
                        self._uncacheable.add(name)
                self._sizes[name] = self._measure_cache(name)
        self.batches = all_batches
        self.cache_bytes = cache_bytes
        self.clear_cache()

    def _measure_cache(self, name: str) -> dict[int, float]:
        """Bytes per image of the tensors that are cached for a module, by address."""
        cached_values = [self._inputs[name]]
        for module in self._needed_outputs(name):
            cached_values.append(self._outputs[module])
        sizes = {}
        for leaf in tree_leaves(cached_values):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes() / len(self.batches[0])
        return sizes

    def clear_cache(self) -> None:
        """Empty the cache. Call this after a change to modules before a cached module."""
        self._inputs: dict[str, list[Any]] = {}
        self._outputs: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def at(self, name: str) -> Generator[None]:
        """Let `self(i)` begin at this module inside a `with` block.

        Do not change modules before this module there. If the net cannot continue from the module,
        the whole net runs.
        """
        if name in self._uncacheable:
            yield
            return
        if name not in self._inputs:
            self._fill_cache(name)
        stubs = {self.modules[module]: self._stub(module) for module in self._modules_before(name)}
        handle = self.modules[name].register_forward_pre_hook(
            lambda *_: self._inputs[name][self._batch_index], with_kwargs=True, prepend=True
        )
        try:
            with patch_forwards(stubs):
                yield
        finally:
            handle.remove()

    def __call__(self, i: int) -> Any:
        """Output of the net for batch `i`; inside `at`, valid only with `needs_net_output`."""
        self._batch_index = i
        return self.net(self.batches[i])

    def output(self, module: str, i: int) -> tuple[tuple[Any, ...], Any]:
        """Positional arguments and output of a module for batch `i`; the forward then stops."""
        results: list[tuple[tuple[Any, ...], Any]] = []

        def save_result(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            results.append((args, output))
            raise StopForward

        handle = self.modules[module].register_forward_hook(save_result)
        try:
            with contextlib.suppress(StopForward):
                self(i)
        finally:
            handle.remove()
        return results[0]

    def _modules_before(self, name: str) -> list[str]:
        """Outermost modules that run only once, and return before the entry of `name` runs."""
        returned_before = self.order.returned_before[self.entries[name]]
        return [module for module in returned_before if module in self.order.called_once]

    def _needed_outputs(self, name: str) -> list[str]:
        """Modules before the entry of `name` that cannot return their input; cache their output."""
        needed = []
        for module in self._modules_before(name):
            can_return_input = module in self.entries and module in self.order.shape_preserving
            if not can_return_input:
                needed.append(module)
        return needed

    def _stub(self, name: str) -> Callable[..., Any]:
        """A `forward` that returns the cached output of a module, or else the module's input."""
        outputs = self._outputs.get(name)
        if outputs is None:
            return lambda x, *args, **kwargs: x
        return lambda *args, **kwargs: outputs[self._batch_index]

    def _modules_to_cache(self, name: str) -> list[str]:
        """The module `name`, and as many modules before it as fit in the cache."""
        num_images = sum(len(batch) for batch in self.batches)
        candidates = [module for module in self.entries if module not in self._uncacheable]
        modules_to_cache: list[str] = []
        sizes: dict[int, float] = {}
        for module in reversed(candidates[: candidates.index(name) + 1]):
            sizes |= self._sizes.get(module, {})
            if modules_to_cache and sum(sizes.values()) * num_images > self.cache_bytes:
                break
            modules_to_cache.append(module)
        return modules_to_cache

    def _fill_cache(self, name: str) -> None:
        """Run all batches up to the entry of `name`, and fill the cache.

        The cache contains the tensors that the modules of `_modules_to_cache(name)` need.
        """
        modules_to_cache = self._modules_to_cache(name)
        self._inputs = {module: [] for module in modules_to_cache}
        self._outputs = {}
        for module in modules_to_cache:
            for needed in self._needed_outputs(module):
                self._outputs[needed] = []

        def save_input(inputs: list[Any]) -> Callable[..., None]:
            return lambda _, *args_and_kwargs: inputs.append(args_and_kwargs)

        def save_output(outputs: list[Any]) -> Callable[..., None]:
            return lambda _, args, output: outputs.append(output)

        def stop(*_: Any) -> None:
            raise StopForward

        hooks: list[RemovableHandle] = []
        for module, inputs in self._inputs.items():
            hook = save_input(inputs)
            hooks.append(self.modules[module].register_forward_pre_hook(hook, with_kwargs=True))
        for module, outputs in self._outputs.items():
            hooks.append(self.modules[module].register_forward_hook(save_output(outputs)))
        entry = self.modules[self.entries[name]]
        hooks.append(entry.register_forward_pre_hook(stop))
        with probing(self.net, hooks):
            for batch in self.batches:
                with contextlib.suppress(StopForward):
                    self.net(batch)


def find_units(
    net: nn.Module, float_net: nn.Module, batches: Sequence[Tensor], setting: str
) -> tuple[dict[str, list[Site]], Runner, Runner]:
    """Find the units to fit one by one: blocks, and quantized layers outside blocks.

    Blocks and layers that do not run exactly once in a forward are left out. So are units that
    do not run in `float_net`, such as a layer whose weight a float attention reads directly.

    Args:
        net: a converted net whose scales are set.
        float_net: the float net before its conversion.
        batches: images (B, C, H, W) each, on the device of the nets.
        setting: the setting that needs the units, for messages.

    Returns:
        A dict that maps the name of each unit to the sites of its quantized weights, all in the
        order in which they run. A runner of `net`. A runner of `float_net`.

    Raises:
        UsageError: the net has no blocks with quantized weights, the float net is quantized, or
            there are no batches.
    """
    if not batches:
        raise UsageError(f"{setting}: batches is empty; must contain at least one batch of images")
    if not all(site.quantizer.is_float for site in iter_quantizers(float_net)):
        raise UsageError(
            f"{setting}: the float net is quantized; must be a copy of the model made before "
            "qat.convert"
        )
    blocks = find_blocks(net)
    layers = [s for s in iter_quantizers(net) if s.role == "weight" and not s.quantizer.is_float]
    unit_of: dict[str, str] = {}
    for site in layers:
        inside = (block for block in blocks if site.name.startswith(f"{block}."))
        unit_of[site.name] = next(inside, site.layer)
    if blocks.keys().isdisjoint(unit_of.values()):
        raise UsageError(
            f"{setting}: must be calibrate for this model, because no block has quantized weights "
            f"({BLOCKS})"
        )
    order = RunOrder(net, batches[0][:1])
    sites_in_order = [s for s in layers if {s.layer, unit_of[s.name]} <= order.called_once]
    sites_in_order.sort(key=lambda site: order.position[site.layer])
    sites_of: dict[str, list[Site]] = {}
    for site in sites_in_order:
        sites_of.setdefault(unit_of[site.name], []).append(site)
    units = {name: sites_of[name] for name in order.position if name in sites_of}
    entries = {name: [name] for name in units}
    float_runner = Runner(float_net, entries, batches)
    units = {name: sites for name, sites in units.items() if name in float_runner.entries}
    return units, Runner(net, entries, batches), float_runner


def check_unit_finite(value: Tensor, unit: str, setting: str) -> None:
    """Raise `UsageError` if the input or output of a unit contains NaN or infinity."""
    if not bool(value.isfinite().all()):
        raise UsageError(
            f"{setting}: the activations of {unit} are NaN or infinite; check data.mean, data.std "
            "and the weights of ckpt"
        )
