"""A net taken apart into quantizers, modules or blocks, each of which can be quantized alone, left in float, or given other bits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from qat.analysis.requantize import GridSite, WeightChange, WeightSites, weight_sites
from qat.model.blocks import find_blocks
from qat.model.convert import conversion_of
from qat.model.sites import Site, iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.calibrate import in_float
from qat.ptq.patching import Forward, patched
from qat.quantizers import Quantizer
from qat.spec import QuantRecipe
from qat.utils.validate import FLOAT_BITS

GRANULARITIES = ("site", "module", "block")
# What holds the quantizers that the net has beside its modules.
WHOLE = "(net)"


@dataclass(frozen=True)
class Part:
    """What changes together.

    Attributes:
        name: of the quantizer, the module or the block.
        sites: its quantizers, identities left out.
        weights: those of its weights whose bits can change.
        fixed: why the bits of its weights cannot be chosen apart from all else; empty = they can.
    """

    name: str
    sites: tuple[Site, ...]
    weights: tuple[GridSite, ...]
    fixed: str = ""

    @property
    def bits(self) -> int | None:
        """Of all its weights, None where they differ."""
        found = {weight.grid.bits for weight in self.weights}
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class TakenApart:
    """A net in parts.

    Attributes:
        weights: of the net; its `net` is what to evaluate.
        parts: in the order of the net's modules.
        recipe: it was converted with, None for a float net.
    """

    weights: WeightSites
    parts: tuple[Part, ...]
    recipe: QuantRecipe | None

    @property
    def net(self) -> nn.Module:
        """What to evaluate."""
        return self.weights.net

    @contextlib.contextmanager
    def only(self, part: Part) -> Generator[None]:
        """While it lasts, everything but one part is in float."""
        own: dict[nn.Module, Forward] = {site.quantizer: site.quantizer.forward for site in part.sites}
        with in_float(self.net), patched(own):
            yield

    @contextlib.contextmanager
    def without(self, part: Part) -> Generator[None]:
        """While it lasts, one part is in float, and so is a norm in integers beside it, which rounds with the steps around it."""
        own: set[nn.Module] = {site.quantizer for site in part.sites}
        forwards: dict[nn.Module, Forward] = dict.fromkeys(own, _unchanged)
        forwards |= {m: m.in_float for m in self.net.modules() if isinstance(m, IntegerLayerNorm) and not own.isdisjoint(m.between)}
        with patched(forwards):
            yield

    @contextlib.contextmanager
    def with_bits(self, bits: Mapping[str, int], steps_from: str) -> Generator[None]:
        """While it lasts, the weights of some parts have other bits; those that have them already stay as they are.

        Args:
            bits: by the name of the part.
            steps_from: see `WeightChange`.
        """
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                if part.name in bits:
                    width = bits[part.name]
                    others = [weight for weight in part.weights if weight.grid.bits != width]
                    stack.enter_context(self.weights.changed(WeightChange(bits=width, steps_from=steps_from), others))
            yield


def take_apart(net: nn.Module, input_size: tuple[int, int, int], by: str) -> TakenApart:
    """Find the parts of a net, quantized or float.

    Args:
        net: scales filled.
        input_size: of its images.
        by: one of `GRANULARITIES`.
    """
    found = weight_sites(net, input_size)
    done = conversion_of(net)
    recipe = None if done is None else done.recipe
    blocks = tuple(find_blocks(found.net))
    block_of = functools.partial(_block, blocks)
    namings: dict[str, Callable[[Site], str]] = {"site": attrgetter("name"), "module": attrgetter("layer"), "block": block_of}
    name_of = namings[by]
    grids: Mapping[Quantizer, GridSite] = {weight.quantizer: weight for weight in found.sites}
    members: dict[str, list[Site]] = {}
    for site in iter_quantizers(found.net):
        members.setdefault(name_of(site) or WHOLE, []).append(site)
    parts = (_part(name, sites, grids, recipe) for name, sites in members.items())
    return TakenApart(found, tuple(part for part in parts if part.sites or part.weights), recipe)


def _part(name: str, sites: list[Site], grids: Mapping[Quantizer, GridSite], recipe: QuantRecipe | None) -> Part:
    weights = tuple(grids[site.quantizer] for site in sites if site.quantizer in grids)
    rounding = tuple(site for site in sites if not site.quantizer.is_float)
    return Part(name, rounding, weights, next(_obstacles(sites, weights, recipe), ""))


def _obstacles(sites: list[Site], weights: tuple[GridSite, ...], recipe: QuantRecipe | None) -> Iterator[str]:
    """What stands against giving the weights other bits by a rule of `overrides`."""
    if not weights:
        yield "it has no weight whose bits can change"
    if len(weights) < sum(site.is_weight for site in sites):
        yield "of one of its quantizers nothing is known"
    if recipe is None:
        return
    for weight in weights:
        if weight.grid.bits == FLOAT_BITS:
            yield "its weights are float by the recipe"
        # In training, a rule about the bits of the first convolution and of a head means their input too.
        if recipe.GROUP == "quant" and weight.place != "block" and recipe.at(weight.name).act_quantizer != "float":
            yield f"a rule about the bits of the {weight.place} is about its input too"


def _block(blocks: tuple[str, ...], site: Site) -> str:
    """The block around a site; in a net without blocks the path up to the first number, `layer1.0`; else its module."""
    around = next((block for block in blocks if site.name.startswith(f"{block}.")), None)
    if around is not None:
        return around
    path = site.layer.split(".")
    numbered = next((i for i, name in enumerate(path) if name.isdigit()), len(path) - 1)
    return ".".join(path[: numbered + 1])


def _unchanged(x: object) -> object:
    return x
