"""The grids of weight quantizers taken apart into step, zero point, code range and rounding, so that each can be exchanged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.affine import affine_from_range, code_range, slices_along, symmetric_scale
from qat.functional.affine_search import SHRINK_FACTORS
from qat.functional.bias_correction import correct_mean_and_std
from qat.functional.lsq import SCALE_FLOOR
from qat.functional.observers import RangeState, affine_from_state, affine_scale, observe, quantiles
from qat.functional.statsq import statsq_scale
from qat.functional.ste import group_size, sum_along, view_along
from qat.kernels import statsq_coordinate
from qat.ptq.observers import reaching_zero
from qat.quantizers import LSQ, Affine, DynamicMinMax, Float, Quantizer, StatsQ
from qat.utils.validate import check_choice

STEPS_FROM = ("own", "minmax", "percentile", "mse")
Round = Callable[[Tensor], Tensor]


class Scales(NamedTuple):
    """One entry per slice along the axis of a grid, (n,) float32 each; (1,) without an axis.

    Attributes:
        scale: proportional to the step between neighbouring levels; what the quantizer calls its scale.
        zero: zero point, in codes.
    """

    scale: Tensor
    zero: Tensor


class WeightGrid(ABC):
    """What a weight quantizer does, at any width, on any scales and with any rounding; without gradients.

    Args:
        quantizer: of a weight; only read.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        self.bits: int = quantizer.spec.bits

    def axis(self, weight: Tensor) -> int | None:
        """Dimension with scales of its own."""
        axis: int | None = self.quantizer.axis
        return axis

    @abstractmethod
    def own(self, weight: Tensor, bits: int) -> Scales:
        """Those in force; at another width than the present one, those that the quantizer's own rule makes of the weight."""

    @abstractmethod
    def from_range(self, low: Tensor, high: Tensor, bits: int) -> Scales:
        """Those whose outermost levels lie at the ends of a range (n,), as closely as the grid allows."""

    @abstractmethod
    def fake_quantize(self, weight: Tensor, scales: Scales, bits: int, rounding: Round) -> Tensor:
        """Values on the grid, float32; codes that rounding takes out of the range are clamped."""


class StatsQGrid(WeightGrid):
    """Levels (k + 1/2) s / 2^(b-1): half steps, without zero. The scale is read off the weight, whatever the width."""

    def axis(self, weight: Tensor) -> int | None:
        """The middle one of three dimensions, else the first."""
        return 1 if weight.ndim == 3 else 0

    def own(self, weight: Tensor, bits: int) -> Scales:
        """Twice the mean magnitude."""
        scale = statsq_scale(weight).flatten()
        return Scales(scale, torch.zeros_like(scale))

    def from_range(self, low: Tensor, high: Tensor, bits: int) -> Scales:
        """The cells of the outermost levels end where the range does."""
        scale = torch.maximum(low.abs(), high.abs())
        return Scales(scale, torch.zeros_like(scale))

    def fake_quantize(self, weight: Tensor, scales: Scales, bits: int, rounding: Round) -> Tensor:
        """`qat.functional.statsq` on other scales."""
        n = 2 ** (bits - 1)
        scale = view_along(scales.scale, weight.ndim, self.axis(weight))
        return (rounding(statsq_coordinate(weight, scale, bits)).clamp(-n, n - 1) + 0.5) / n * scale


class LsqGrid(WeightGrid):
    """Levels k s with a learned step s."""

    def own(self, weight: Tensor, bits: int) -> Scales:
        """The learned step; at another width the step from which LSQ would start to learn."""
        kept = bits == self.bits
        bounds = code_range(bits, signed=True)
        scale = self.quantizer.scale.detach().float() if kept else self.quantizer.first_step(weight, *bounds)
        return Scales(scale.clamp(min=SCALE_FLOOR), torch.zeros_like(scale))

    def from_range(self, low: Tensor, high: Tensor, bits: int) -> Scales:
        """Symmetric: the larger end at half the number of steps."""
        return Scales(*symmetric_scale(low, high, *code_range(bits, signed=True)))

    def fake_quantize(self, weight: Tensor, scales: Scales, bits: int, rounding: Round) -> Tensor:
        """`qat.functional.lsq` on other steps."""
        step = view_along(scales.scale, weight.ndim, self.axis(weight))
        return rounding((weight.float() / step).clamp(*code_range(bits, signed=True))) * step


class AffineGrid(WeightGrid):
    """Levels (k - z) s with a zero point z, and the mean and spread of the float rows where the net corrects them."""

    def own(self, weight: Tensor, bits: int) -> Scales:
        """The calibrated ones; at another width those of the same observer."""
        if bits == self.bits:
            return Scales(self.quantizer.scale.detach().float(), self.quantizer.zero_point.float())
        method, axis = self.quantizer.spec.observer or "minmax", self.axis(weight)
        state = reaching_zero(observe(None, weight, axis, method))
        return Scales(*affine_from_state(state, weight, bits, signed=self.signed, axis=axis, method=method))

    def from_range(self, low: Tensor, high: Tensor, bits: int) -> Scales:
        """Asymmetric for unsigned codes, symmetric for signed ones."""
        return Scales(*affine_from_range(*reaching_zero(RangeState(low, high)), bits, signed=self.signed))

    def fake_quantize(self, weight: Tensor, scales: Scales, bits: int, rounding: Round) -> Tensor:
        """`qat.functional.fake_quantize_affine` on other scales."""
        axis = self.axis(weight)
        step, zero = (view_along(t, weight.ndim, axis) for t in scales)
        codes = rounding(weight.float() / step + zero).clamp(*code_range(bits, signed=self.signed))
        y = (codes - zero) * step
        return correct_mean_and_std(y, weight.float(), axis or 0) if self.quantizer.spec.bias_correction else y

    @property
    def signed(self) -> bool:
        """Where the codes lie."""
        return bool(self.quantizer.qmin < 0)


class SymmetricGrid(AffineGrid):
    """Levels k s whose range is read off the weight."""

    def own(self, weight: Tensor, bits: int) -> Scales:
        """The range of the weight, whatever the width."""
        return Scales(*affine_scale(weight, bits, signed=True, axis=self.axis(weight)))

    @property
    def signed(self) -> bool:
        """Always: the zero point is 0."""
        return True


class FloatGrid(SymmetricGrid):
    """A weight that is not quantized: at a lower width, symmetric codes.

    Args:
        quantizer: the identity.
        axis: dimension with scales of its own, None = one for the tensor.
    """

    def __init__(self, quantizer: Float, axis: int | None) -> None:
        super().__init__(quantizer)
        self._axis = axis

    def axis(self, weight: Tensor) -> int | None:
        """The one that was asked for."""
        return self._axis


_GRIDS: dict[type[Quantizer], type[WeightGrid]] = {StatsQ: StatsQGrid, LSQ: LsqGrid, Affine: AffineGrid, DynamicMinMax: SymmetricGrid}


def grid_of(quantizer: Quantizer, float_axis: int | None) -> WeightGrid | None:
    """The grid of a weight quantizer, None where nothing is known of its class.

    Args:
        quantizer: of a weight.
        float_axis: of a weight that is not quantized.
    """
    if isinstance(quantizer, Float):
        return FloatGrid(quantizer, float_axis)
    return next((grid(quantizer) for kind, grid in _GRIDS.items() if isinstance(quantizer, kind)), None)


def derived(grid: WeightGrid, weight: Tensor, bits: int, steps_from: str, percentile: float) -> Scales:
    """Scales of a weight for a width.

    Args:
        grid: of the weight.
        weight: (out, ...) float.
        bits: 2 to 8.
        steps_from: `own` rule of the quantizer (at the present width: those in force), `minmax`, `percentile`, or `mse`: the range shrunk
            by the one factor of 1, 0.99, ... 0.11 per slice with the smallest squared error.
        percentile: share of the entries of a slice below the upper end of `percentile`, and above the lower end.

    Raises:
        UsageError: unknown rule.
    """
    check_choice("steps_from", steps_from, STEPS_FROM)
    if steps_from == "own":
        return grid.own(weight, bits)
    rows = slices_along(weight, grid.axis(weight))
    low, high = quantiles(rows, 1 - percentile, percentile) if steps_from == "percentile" else rows.aminmax(dim=1)
    return _least_error(grid, weight, (low, high), bits) if steps_from == "mse" else grid.from_range(low, high, bits)


def _least_error(grid: WeightGrid, weight: Tensor, ends: tuple[Tensor, Tensor], bits: int) -> Scales:
    """Of equal errors the one of the widest range."""
    axis, x = grid.axis(weight), weight.float()
    factors = torch.tensor(SHRINK_FACTORS, dtype=torch.float32, device=x.device)
    low, high = ends

    def error(factor: Tensor) -> Tensor:
        y = grid.fake_quantize(weight, grid.from_range(low * factor, high * factor, bits), bits, torch.round)
        return sum_along((y - x).square(), axis) / group_size(x, axis)

    best = factors[torch.stack([error(factor) for factor in factors]).argmin(0)]
    return grid.from_range(low * best, high * best, bits)
