"""Weights of a net fake-quantized with other step sizes or at other widths; for a while, bit-exactly undone."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.affine import asymmetric_scale, code_range, correct_mean_and_std, slices_along, symmetric_scale
from qat.functional.observers import SHRINK_FACTORS, RangeState, reaching_zero
from qat.functional.ste import group_size, sum_along
from qat.model.convert import conversion_of, convert, stem_and_heads
from qat.model.sites import iter_quantizers
from qat.ptq.runner import patched
from qat.quantizers import Quantizer, UniformGrid, build_quantizer
from qat.spec import PRESETS, QuantRecipe, QuantSpec
from qat.utils.validate import FLOAT_BITS, HIGHEST_BITS

STEPS_FROM = ("own", "mse")


@dataclass(frozen=True)
class WeightGrid:
    """What a weight quantizer does, at any width and on any grid of its form; without gradients.

    Attributes:
        quantizer: of a weight; only read. For a weight that is not quantized, one with symmetric codes.
        bits: in force.
    """

    quantizer: Quantizer
    bits: int

    def own(self, weight: Tensor, bits: int) -> UniformGrid:
        """The grid in force; at another width than the present one, what the quantizer's own rule makes of the weight."""
        quantizer = self.quantizer
        if bits != quantizer.spec.bits:
            quantizer = type(quantizer)(dataclasses.replace(quantizer.spec, bits=bits))
            quantizer.allocate(weight.shape, weight.device)
            quantizer.calibrate(weight, {})
        found = quantizer.grid(weight)
        if not isinstance(found, UniformGrid):
            raise TypeError(f"{type(quantizer).__name__} has no grid of evenly spaced values")
        return found

    def least_error(self, weight: Tensor, bits: int) -> UniformGrid:
        """The grid whose outermost values lie at the ends of each slice's range, times that of 1, 0.99, ... 0.11 of least squared error."""
        form = self.own(weight, self.quantizer.spec.bits)
        qmin, qmax = code_range(bits, signed=form.qmin < 0)
        low, high = slices_along(weight, form.axis).aminmax(dim=1)

        def shrunk(factor: Tensor) -> UniformGrid:
            ends = low * factor, high * factor
            if form.is_half_step:  # the cells of the outermost values end where the range does
                step = torch.maximum(ends[0].abs(), ends[1].abs()) / 2 ** (bits - 1)
                return dataclasses.replace(form, step=step, qmin=qmin, qmax=qmax)
            step, zero = (symmetric_scale if qmin < 0 else asymmetric_scale)(*reaching_zero(RangeState(*ends)), qmin, qmax)
            return dataclasses.replace(form, step=step, zero_point=zero, qmin=qmin, qmax=qmax)

        x = weight.float()
        factors = torch.tensor(SHRINK_FACTORS, dtype=torch.float32, device=x.device)
        errors = [sum_along((self.fake_quantize(weight, shrunk(factor)) - x).square(), form.axis) for factor in factors]
        return shrunk(factors[(torch.stack(errors) / group_size(x, form.axis)).argmin(0)])

    def fake_quantize(self, weight: Tensor, grid: UniformGrid) -> Tensor:
        """Values on a grid, float32; codes outside of its range are clamped."""
        y = grid.dequantize(grid.to_code_coordinates(weight).round().clamp(grid.qmin, grid.qmax))
        return correct_mean_and_std(y, weight.float(), grid.axis or 0) if self.quantizer.spec.bias_correction else y


def grid_of(quantizer: Quantizer, float_axis: int | None = 0) -> WeightGrid:
    """The grid of a weight quantizer.

    Args:
        quantizer: of a weight.
        float_axis: of a weight that is not quantized: dimension that keeps step sizes of its own, None = one for the tensor.
    """
    if quantizer.is_float:
        return WeightGrid(build_quantizer(QuantSpec("weight", "minmax_dynamic", HIGHEST_BITS, axis=float_axis)), FLOAT_BITS)
    return WeightGrid(quantizer, quantizer.spec.bits)


@torch.no_grad()
def requantized(
    grid: WeightGrid,
    weight: Tensor,
    *,
    bits: int | None = None,
    steps_from: str = "own",
    resize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A weight, fake-quantized otherwise than its quantizer does; by default in the same way, to the last bit.

    Args:
        grid: of its quantizer.
        weight: the float master (out, ...), what the quantizer is called with.
        bits: width, 2 to 8; 32 = the float weight; None = the present one.
        steps_from: where step sizes come from: the quantizer's `own` rule (at the present width: those in force), or `mse`, least error.
        resize: makes the step sizes used of those. The range of codes stays, so that values beyond it are clamped as in deployment.

    Returns:
        The shape and dtype of `weight`. A float weight stays one unless `bits` is given.
    """
    bits = bits or grid.bits
    if bits == FLOAT_BITS:
        return weight
    onto = grid.own(weight, bits) if steps_from == "own" else grid.least_error(weight, bits)
    if resize is not None:
        onto = dataclasses.replace(onto, step=resize(onto.step))
    return grid.fake_quantize(weight, onto).to(weight.dtype)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """2^round(log2 x) of non-negative numbers, exactly; 0 stays 0."""
    mantissa, exponent = torch.frexp(x)
    rounded = torch.where(mantissa >= 0.5**0.5, exponent, exponent - 1)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), rounded), x)


@dataclass(frozen=True)
class GridSite:
    """A weight whose quantization can be changed.

    Attributes:
        name: of the module that owns it.
        place: `stem`, `block` or `head`.
        quantizer: what the net calls.
        grid: what it does.
        shape: of the weight, (out, ...).
    """

    name: str
    place: str
    quantizer: Quantizer
    grid: WeightGrid
    shape: torch.Size


@dataclass(frozen=True)
class WeightSites:
    """The weights of a net.

    Attributes:
        net: what to evaluate: the net itself, or of a net without quantizers a twin that shares its tensors.
        sites: weights that can be changed.
        left_alone: names of quantized weights of whose quantizer nothing is known.
        is_float: no weight is quantized.
    """

    net: nn.Module
    sites: tuple[GridSite, ...]
    left_alone: tuple[str, ...]
    is_float: bool


def weight_sites(net: nn.Module, input_size: tuple[int, int, int], float_axis: int | None = 0) -> WeightSites:
    """The weights of a net, quantized or not. A quantizer counts as known if its grid gives back what it gives, bit for bit.

    Args:
        net: quantized with scales filled, or float; stays as it is.
        input_size: of its images.
        float_axis: dimension of float weights that gets step sizes of its own when they are quantized, None = one for the tensor.
    """
    twin = net
    if conversion_of(net) is None:
        shared = {id(t): t for t in (*net.parameters(), *net.buffers())}
        identities = QuantRecipe(**PRESETS["fp"])  # unlike qat.recipe("fp"), which leaves a net untouched
        twin = convert(copy.deepcopy(net, shared), identities, input_size=input_size).eval()
    places = stem_and_heads(twin)
    known, unknown = [], []
    for site in iter_quantizers(twin):
        if not site.is_weight:
            continue
        quantizer, weight = site.quantizer, site.latent().detach()
        grid = grid_of(quantizer, float_axis)
        with torch.no_grad():
            has_grid = quantizer.is_float or isinstance(quantizer.grid(weight), UniformGrid)
            if has_grid and torch.equal(requantized(grid, weight), quantizer(weight)):
                known.append(GridSite(site.layer, places.get(site.layer, "block"), quantizer, grid, weight.shape))
            else:
                unknown.append(site.layer)
    return WeightSites(twin, tuple(known), tuple(unknown), not unknown and all(site.quantizer.is_float for site in known))


def changed(sites: Sequence[GridSite], **change: Any) -> AbstractContextManager[None]:
    """While it lasts these weights are `requantized` with a change; no tensor of the net is touched."""
    return patched({site.quantizer: functools.partial(requantized, site.grid, **change) for site in sites})
