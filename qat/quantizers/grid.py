"""The levels of a weight quantizer: code k stands for (k + shift) * step."""

from __future__ import annotations

from torch import Tensor

from qat.functional.lsq import SCALE_FLOOR
from qat.functional.ste import view_along
from qat.quantizers.lsq import LSQ
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.statsq import StatsQ


def has_grid(quantizer: Quantizer) -> bool:
    """True for quantizers that `weight_grid` knows."""
    return isinstance(quantizer, StatsQ | LSQ)


def weight_grid(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, float]:
    """Step, which broadcasts against the weight, and shift; the step is float32 and without gradient.

    Args:
        quantizer: of a weight.
        weight: (out, ...); StatsQ reads its step off it.

    Raises:
        TypeError: the quantizer has no such grid.
    """
    if isinstance(quantizer, StatsQ):
        return quantizer.scale_of(weight) / 2 ** (quantizer.spec.bits - 1), 0.5
    if isinstance(quantizer, LSQ):
        return view_along(quantizer.scale.detach().float().clamp(min=SCALE_FLOOR), weight.ndim, quantizer.axis), 0.0
    raise TypeError(f"{type(quantizer).__name__} has no grid of evenly spaced levels")
