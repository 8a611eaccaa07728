"""Where values lie on the axis of a quantizer's codes: a code is the coordinate rounded, a threshold is half-way between two codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import SCALE_FLOOR
from qat.functional.observers import affine_scale
from qat.functional.ste import view_along
from qat.quantizers import LSQ, ActStatsQ, Affine, AutoSignLSQ, DynamicMinMax, Log2, Quantizer, Shifted, StatsQ


class Placed(NamedTuple):
    """A tensor on the axis of codes.

    Attributes:
        z: coordinates, float32, the shape of the tensor; the code is `z` rounded and clamped. NaN where the step is zero.
        step: distance of neighbouring levels in the unit of the tensor, broadcasts against it; NaN where levels are not evenly spaced.
        low: lowest code.
        high: highest code.
    """

    z: Tensor
    step: Tensor
    low: int
    high: int


@torch.no_grad()
def placed(quantizer: Quantizer, x: Tensor) -> Placed | None:
    """Coordinates of what a quantizer is given; None for a quantizer whose axis is not known, such as one of the user's."""
    x = x.detach().float()
    if isinstance(quantizer, Shifted):
        return placed(quantizer.quantizer, x + quantizer.offset_before)
    if isinstance(quantizer, StatsQ | ActStatsQ):
        step = quantizer.scale_of(x) / 2 ** (quantizer.spec.bits - 1)
        return Placed(x / step - 0.5, step, -(2 ** (quantizer.spec.bits - 1)), 2 ** (quantizer.spec.bits - 1) - 1)
    if isinstance(quantizer, LSQ):
        step = view_along(quantizer.scale.detach().float().clamp(min=SCALE_FLOOR), x.ndim, quantizer.axis)
        return Placed(x / step, step, *code_bounds(quantizer))
    if isinstance(quantizer, Affine | DynamicMinMax):
        step, zero = (view_along(t.float(), x.ndim, quantizer.axis) for t in _affine(quantizer, x))
        return Placed(x / step + zero, step, *code_bounds(quantizer))
    if isinstance(quantizer, Log2):
        return Placed(-x.log2(), torch.full((), torch.nan, device=x.device), *code_bounds(quantizer))
    return None


def code_bounds(quantizer: Quantizer) -> tuple[int, int]:
    """Lowest and highest code that the quantizer can give; for a quantizer of an unknown class those of its spec."""
    inner = quantizer.quantizer if isinstance(quantizer, Shifted) else quantizer
    if isinstance(inner, AutoSignLSQ):
        return inner.bounds[bool(inner.signed > 0)]
    if isinstance(inner, Affine):
        return inner.qmin, inner.qmax
    if isinstance(inner, Log2):
        return 0, 2**inner.spec.bits - 1
    if isinstance(inner, StatsQ | ActStatsQ):
        return -(2 ** (inner.spec.bits - 1)), 2 ** (inner.spec.bits - 1) - 1
    return inner.spec.qmin, inner.spec.qmax


def _affine(quantizer: Affine | DynamicMinMax, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(quantizer, Affine):
        return quantizer.scale.detach(), quantizer.zero_point
    return affine_scale(x, quantizer.spec.bits, signed=True, axis=quantizer.axis)
