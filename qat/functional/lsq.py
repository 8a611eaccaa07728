"""LSQ: learned step size quantization. Source: arXiv 1902.08153, as used by OFQ (arXiv 2302.02210)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat.functional.ste import code_dtype, group_size, mean_abs, sum_along, view_along

SCALE_FLOOR = 1e-5


def _step(scale: Tensor, ndim: int, axis: int | None) -> Tensor:
    # clamp lets NaN through: a scale that was never initialised must not look like a number.
    return view_along(scale.float().clamp(min=SCALE_FLOOR), ndim, axis)


def _just_outside(code: int) -> float:
    """The float32 neighbour of `code` away from zero; below 0, a value too small to matter."""
    ulp = 2.0 ** (abs(code).bit_length() - 24) if code else torch.finfo(torch.float32).tiny
    return code + ulp if code > 0 else code - ulp


class _LSQ(torch.autograd.Function):
    """Keeps the input and the scale for backward, no mask and no codes."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, bounds: tuple[int, int], axis: int | None, grad_factor: float) -> Tensor:
        step = _step(scale, x.ndim, axis)
        return ((x.float() / step).clamp(*bounds).round() * step).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, scale, ctx.bounds, ctx.axis, ctx.grad_factor = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        u = x.float() / _step(scale, x.ndim, ctx.axis)
        g = grad.float()
        # hardtanh's open range between the neighbours of the bounds is LSQ's closed range, masked in one pass over the data.
        grad_x = torch.ops.aten.hardtanh_backward(g, u, *map(_just_outside, ctx.bounds))
        grad_scale = None
        if ctx.needs_input_grad[1]:
            gradient_scale = ctx.grad_factor / math.sqrt(ctx.bounds[1] * group_size(x, ctx.axis))
            clamped = u.clamp(*ctx.bounds)  # where u overflows, 0 * inf would be NaN; inside the range they are the same
            error = g * clamped.round() - grad_x * clamped
            grad_scale = (sum_along(error, ctx.axis) * gradient_scale).to(scale.dtype)
        return grad_x.to(x.dtype), grad_scale, None, None, None


def lsq(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, *, grad_factor: float = 1.0) -> Tensor:
    """Quantize to round(clamp(x / s, qmin, qmax)) * s with a learned step s = max(scale, 1e-5).

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None, in the unit of `x`.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own, None = one for the tensor.
        grad_factor: extra factor on the gradient of `scale`, beside LSQ's 1 / sqrt(qmax * m), m = elements per scale.

    Returns:
        The shape and dtype of `x`. Gradient of `x`: passes inside the closed range, zero outside. Gradient of `scale`: LSQ,
        straight through the floor of 1e-5.
    """
    return _LSQ.apply(x, scale, (qmin, qmax), axis, grad_factor)


def lsq_codes(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """Integer codes of `lsq`, in [qmin, qmax], int8 where they fit, else int16; the shape of `x`."""
    codes = (x.detach().float() / _step(scale.detach(), x.ndim, axis)).clamp(qmin, qmax).round()
    return codes.to(code_dtype(qmin, qmax))


def lsq_init_scale(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """First step from data: 2 * mean|x| / sqrt(qmax), or 4 * mean|x| / sqrt(qmax) where qmin = 0.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`.
    """
    return (2 if qmin else 4) * mean_abs(x.detach(), axis) / math.sqrt(qmax)
