"""Weights on grids other than those of their quantizers: another width, other steps, another rounding; without gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.functional.affine import asymmetric_scale, code_range, slices_along, symmetric_scale
from qat.functional.affine_search import SHRINK_FACTORS
from qat.functional.bias_correction import correct_mean_and_std
from qat.functional.observers import RangeState, quantiles, reaching_zero
from qat.functional.ste import group_size, sum_along
from qat.quantizers import Quantizer, UniformGrid, build_quantizer
from qat.spec import QuantSpec
from qat.utils.validate import FLOAT_BITS, HIGHEST_BITS

STEPS_FROM = ("own", "minmax", "percentile", "mse")
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WeightGrid:
    """What a weight quantizer does, at any width, on any grid of its form and with any rounding.

    Attributes:
        quantizer: of a weight; only read. For a weight that is not quantized one with symmetric codes.
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

    def from_range(self, weight: Tensor, ends: tuple[Tensor, Tensor], bits: int) -> UniformGrid:
        """The grid whose outermost values lie at the ends of a range (n,) each, as closely as its form allows.

        Half steps: the cells of the outermost values end where the range does. Else symmetric for signed codes, with a zero point for
        unsigned ones.
        """
        form = self.own(weight, self.quantizer.spec.bits)
        qmin, qmax = code_range(bits, signed=form.qmin < 0)
        if form.is_half_step:
            step = torch.maximum(ends[0].abs(), ends[1].abs()) / 2 ** (bits - 1)
            return dataclasses.replace(form, step=step, qmin=qmin, qmax=qmax)
        rule = symmetric_scale if qmin < 0 else asymmetric_scale
        step, zero = rule(*reaching_zero(RangeState(*ends)), qmin, qmax)
        return dataclasses.replace(form, step=step, zero_point=zero, qmin=qmin, qmax=qmax)

    def fake_quantize(self, weight: Tensor, grid: UniformGrid, rounding: Round = torch.round) -> Tensor:
        """Values on a grid, float32; codes that rounding takes out of the range are clamped."""
        codes = rounding(grid.to_code_coordinates(weight)).clamp(grid.qmin, grid.qmax)
        y = grid.dequantize(codes)
        return correct_mean_and_std(y, weight.float(), grid.axis or 0) if self.quantizer.spec.bias_correction else y


def grid_of(quantizer: Quantizer, float_axis: int | None) -> WeightGrid:
    """The grid of a weight quantizer.

    Args:
        quantizer: of a weight.
        float_axis: of a weight that is not quantized: dimension that keeps steps of its own, None = one for the tensor.
    """
    if quantizer.is_float:
        return WeightGrid(build_quantizer(QuantSpec("weight", "minmax_dynamic", HIGHEST_BITS, axis=float_axis)), FLOAT_BITS)
    return WeightGrid(quantizer, quantizer.spec.bits)


def derived(grid: WeightGrid, weight: Tensor, bits: int, steps_from: str, percentile: float) -> UniformGrid:
    """The grid of a weight for a width.

    Args:
        grid: of the weight.
        weight: (out, ...) float.
        bits: 2 to 8.
        steps_from: `own` rule of the quantizer (at the present width: those in force), `minmax`, `percentile`, or `mse`: the range shrunk
            by the one factor of 1, 0.99, ... 0.11 per slice with the smallest squared error.
        percentile: share of the entries of a slice below the upper end of `percentile`, and above the lower end.
    """
    if steps_from == "own":
        return grid.own(weight, bits)
    rows = slices_along(weight, grid.own(weight, grid.quantizer.spec.bits).axis)
    low, high = quantiles(rows, 1 - percentile, percentile) if steps_from == "percentile" else rows.aminmax(dim=1)
    return _least_error(grid, weight, (low, high), bits) if steps_from == "mse" else grid.from_range(weight, (low, high), bits)


def _least_error(grid: WeightGrid, weight: Tensor, ends: tuple[Tensor, Tensor], bits: int) -> UniformGrid:
    """Of equal errors the one of the widest range."""
    x, widest = weight.float(), grid.from_range(weight, ends, bits)
    factors = torch.tensor(SHRINK_FACTORS, dtype=torch.float32, device=x.device)
    low, high = ends

    def error(factor: Tensor) -> Tensor:
        y = grid.fake_quantize(weight, grid.from_range(weight, (low * factor, high * factor), bits))
        return sum_along((y - x).square(), widest.axis) / group_size(x, widest.axis)

    best = factors[torch.stack([error(factor) for factor in factors]).argmin(0)]
    return grid.from_range(weight, (low * best, high * best), bits)
