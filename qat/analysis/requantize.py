"""Weights of a net fake-quantized with other steps, at other widths, rounded or clipped in other ways; for a while, bit-exactly undone."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.analysis.grids import Round, WeightGrid, derived, grid_of
from qat.model.convert import conversion_of, convert, stem_and_heads
from qat.model.sites import iter_quantizers
from qat.ptq.patching import patched
from qat.quantizers import Quantizer, UniformGrid
from qat.spec import PRESETS, QuantRecipe
from qat.utils.validate import FLOAT_BITS

# Grids by the number of a weight, its width, where its steps come from, and a percentile.
Found = dict[tuple[int, int, str, float], UniformGrid]


@dataclass(frozen=True)
class WeightChange:
    """How a weight is fake-quantized otherwise than its quantizer does. The default changes nothing, to the last bit.

    Attributes:
        bits: width, 2 to 8; 32 = the float weight; None = the present one.
        steps_from: where steps come from, one of `STEPS_FROM`; `own` at the present width are those in force.
        ratio: every step times this. The range of codes stays, so that values beyond it are clamped as in deployment.
        steps: `any`, or the nearest `power_of_two` in log2, ratio included.
        rounding: `nearest` (even), `half_up`, `floor` or `stochastic`, all on the axis of codes.
        percentile: for steps from `percentile`.
        seed: for stochastic rounding.
    """

    bits: int | None = None
    steps_from: str = "own"
    ratio: float = 1.0
    steps: str = "any"
    rounding: str = "nearest"
    percentile: float = 0.999
    seed: int = 0


@torch.no_grad()
def requantized(grid: WeightGrid, weight: Tensor, change: WeightChange, number: int = 0, found: Found | None = None) -> Tensor:
    """A weight, fake-quantized with a change.

    Args:
        grid: of its quantizer.
        weight: the float master (out, ...), what the quantizer is called with.
        change: what is different.
        number: of the weight in its net; no two draw the same numbers for stochastic rounding.
        found: remembers the scales that were searched for, of weights that stay as they are.

    Returns:
        The shape and dtype of `weight`. A float weight stays one unless the change has a width.
    """
    bits = change.bits or grid.bits
    if bits == FLOAT_BITS:
        return weight
    rule = (change.steps_from, change.percentile)
    onto = None if found is None else found.get((number, bits, *rule))
    if onto is None:
        onto = derived(grid, weight, bits, *rule)
    if found is not None and change.steps_from != "own":
        found[number, bits, *rule] = onto
    step = onto.step * change.ratio
    onto = dataclasses.replace(onto, step=nearest_power_of_two(step) if change.steps == "power_of_two" else step)
    return grid.fake_quantize(weight, onto, _rounding(change, number)).to(weight.dtype)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """2^round(log2 x) of non-negative numbers, exactly; 0 stays 0."""
    mantissa, exponent = torch.frexp(x)
    rounded = torch.where(mantissa >= 0.5**0.5, exponent, exponent - 1)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), rounded), x)


def half_up(x: Tensor) -> Tensor:
    """The nearest whole number, of two equally near the larger. Not floor(x + 1/2), whose sum rounds."""
    below = x.floor()
    return below + (x - below >= 0.5)


def stochastic(x: Tensor, seed: int) -> Tensor:
    """The whole number below or above, with the chances that make the expectation x; the same draws on every device."""
    below = x.floor()
    draws = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    return below + (draws < x - below)


def _rounding(change: WeightChange, number: int) -> Round:
    if change.rounding == "stochastic":
        return functools.partial(stochastic, seed=change.seed * 1_000_003 + number)
    plain: dict[str, Round] = {"nearest": torch.round, "half_up": half_up, "floor": torch.floor}
    return plain[change.rounding]


@dataclass(frozen=True)
class GridSite:
    """A weight whose quantization can be changed.

    Attributes:
        name: of the module that owns it.
        place: `stem`, `block` or `head`.
        quantizer: what the net calls.
        grid: what it does.
        numel: entries of the weight.
    """

    name: str
    place: str
    quantizer: Quantizer
    grid: WeightGrid
    numel: int


@dataclass(frozen=True)
class WeightSites:
    """The weights of a net, which have to stay as they are: scales that have to be searched for are found once.

    Attributes:
        net: what to evaluate: the net itself, or of a net without quantizers a twin that shares its tensors.
        sites: weights that can be changed.
        left_alone: names of quantized weights of whose quantizer nothing is known.
        is_float: none of the weights is quantized.
    """

    net: nn.Module
    sites: tuple[GridSite, ...]
    left_alone: tuple[str, ...] = ()
    is_float: bool = False
    _found: Found = field(default_factory=dict, repr=False, compare=False)

    def changed(self, change: WeightChange, sites: Sequence[GridSite]) -> AbstractContextManager[None]:
        """While it lasts these weights are quantized with the change; no tensor of the net is touched."""
        numbers = {site.quantizer: number for number, site in enumerate(self.sites)}
        rest: dict[str, Any] = {"change": change, "found": self._found}
        return patched({s.quantizer: functools.partial(requantized, s.grid, number=numbers[s.quantizer], **rest) for s in sites})


def weight_sites(net: nn.Module, input_size: tuple[int, int, int], float_axis: int | None = 0) -> WeightSites:
    """The weights of a net, quantized or not.

    A quantizer is only counted as known if its grid gives back what it gives, bit for bit.

    Args:
        net: quantized with scales filled, or float; stays as it is.
        input_size: of its images.
        float_axis: dimension of float weights that gets scales of its own when they are quantized, None = one for the tensor.
    """
    twin = net if conversion_of(net) is not None else _twin(net, input_size)
    where = stem_and_heads(twin)
    known, unknown = [], []
    for site in iter_quantizers(twin):
        if not site.is_weight:
            continue
        name, weight = site.layer, site.latent().detach()
        grid = grid_of(site.quantizer, float_axis)
        if not _same(grid, site.quantizer, weight):
            unknown.append(name)
            continue
        known.append(GridSite(name, where.get(name, "block"), site.quantizer, grid, weight.numel()))
    is_float = not unknown and all(site.quantizer.is_float for site in known)
    return WeightSites(twin, tuple(known), tuple(unknown), is_float)


@torch.no_grad()
def _same(grid: WeightGrid, quantizer: Quantizer, weight: Tensor) -> bool:
    if not (quantizer.is_float or isinstance(quantizer.grid(weight), UniformGrid)):
        return False
    return torch.equal(requantized(grid, weight, WeightChange()), quantizer(weight))


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()


def _twin(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """The net with identities where weight quantizers would be; its tensors are the net's own."""
    identities = QuantRecipe(**PRESETS["fp"])  # unlike qat.recipe("fp"), which leaves a net untouched
    return convert(copy.deepcopy(net, {id(t): t for t in _tensors(net)}), identities, input_size=input_size).eval()
