"""E4M3 floats of 8 bits with one scale for a tensor or for each slice of it.

Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.block_floats import BLOCK_FORMATS, E4M3_MAX, nearest_float
from qat.functional.lsq import CodeRange, LSQFunction, broadcast_step
from qat.functional.ste import TINY

E4M3 = BLOCK_FORMATS["mxfp", 8]


class E4M3Range(CodeRange):
    """A range of LSQ whose codes are the values of E4M3 instead of integers."""

    @property
    def floor(self) -> float:
        """Minimum scale."""
        return TINY

    def nearest(self, clamped: Tensor) -> Tensor:
        """The value of E4M3 nearest to each x / s; ties round to even."""
        return nearest_float(clamped, E4M3)


def fp8_scale(low: Tensor, high: Tensor) -> Tensor:
    """The scale max(|low|, |high|) / 448 of a range; at least 2^-125, so that it is never 0.

    Args:
        low: (n,), smallest value of each slice.
        high: (n,), largest value of each slice.

    Returns:
        The shape of `low`, float32.
    """
    largest = torch.maximum(low.abs(), high.abs())
    return (largest / E4M3_MAX).clamp(min=2 * TINY)


def fp8(x: Tensor, scale: Tensor, axis: int | None, grad_factor: float = 1.0) -> Tensor:
    """Quantize to E4M3(x / s) * s; E4M3 rounds to the nearest value and saturates at 448.

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None, in the unit of `x`; s = max(scale, 2^-126).
        axis: dimension along which scales differ; None = one scale for the tensor.
        grad_factor: extra factor on the gradient of `scale`, besides LSQ's 1 / sqrt(448 * m), with
            m elements per scale.

    Returns:
        The shape and dtype of `x`. The gradient of `x` passes where |x| is at most 448 s, and is
        zero elsewhere. The gradient of `scale` is LSQ's, with values of E4M3 instead of codes.

    Raises:
        UsageError: `scale` does not fit the shape of `x`.
    """
    value_range = E4M3Range(-E4M3_MAX, E4M3_MAX, axis)
    return LSQFunction.apply(x, scale, None, None, None, value_range, grad_factor)


def fp8_codes(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """Codes of `fp8`: sign, exponent and mantissa as bits.

    Returns:
        uint8 in the shape of `x`: the bytes of `torch.float8_e4m3fn` values.
    """
    value_range = E4M3Range(-E4M3_MAX, E4M3_MAX, axis)
    u = x.detach().float() / broadcast_step(scale.detach(), x.ndim, value_range)
    return nearest_float(u, E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
