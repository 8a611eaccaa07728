"""LSQ: learned step size quantization. Source: arXiv 1902.08153, as used by OFQ (arXiv 2302.02210)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat import kernels
from qat.functional.affine_search import affine_error
from qat.functional.ste import code_dtype, group_size, mean_abs
from qat.kernels import SCALE_FLOOR, Grid, reference

__all__ = ["SCALE_FLOOR", "gradient_scale", "lsq", "lsq_codes", "lsq_init_scale", "mse_init_scale"]

# In eighths of a power of two around LSQ's first step: at 2 bits finer ones lower the error by less than 1 %.
MSE_FACTORS = tuple(2 ** (i / 8) for i in range(-24, 33))


def gradient_scale(x: Tensor, grid: Grid, grad_factor: float, sign: Tensor | None = None) -> float | Tensor:
    """LSQ's factor on the gradient of a step: `grad_factor` / sqrt(qmax * m), m = elements of `x` per step."""
    _, highest = grid.bounds(sign)
    m = max(group_size(x, grid.axis), 1)
    return grad_factor / ((highest * m).sqrt() if isinstance(highest, Tensor) else math.sqrt(highest * m))


class _LSQ(torch.autograd.Function):
    """Keeps the input, the scale and the offset in front for backward, no mask and no codes."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, before: Tensor | None, after: Tensor | None, sign: Tensor | None, grid: Grid, grad_factor: float
    ) -> Tensor:
        return kernels.lsq_forward(x, scale, before, after, grid, sign=sign).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, scale, before, after, sign, ctx.grid, ctx.grad_factor = inputs
        ctx.after_shape = None if after is None else after.shape
        ctx.save_for_backward(x, scale, before, sign)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, before, sign = ctx.saved_tensors
        # What is differentiated once more has to be made of operations that autograd knows.
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        backward = reference.lsq_gradients if plain else kernels.lsq_backward
        found = backward(grad, x, scale, before, ctx.grid, sign=sign, after_shape=ctx.after_shape)
        of_scale = (found.scale * gradient_scale(x, ctx.grid, ctx.grad_factor, sign)).to(scale.dtype) if ctx.needs_input_grad[1] else None
        return found.x.to(x.dtype), of_scale, found.before, found.after, None, None, None


def lsq(  # noqa: PLR0913, PLR0917  (a grid, and what may stand around it)
    x: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    *,
    grad_factor: float = 1.0,
    before: Tensor | None = None,
    after: Tensor | None = None,
    sign: Tensor | None = None,
) -> Tensor:
    """Quantize to round(clamp((x + a) / s, qmin, qmax)) * s + c with a learned step s = max(scale, 1e-5).

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None, in the unit of `x`.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own, None = one for the tensor.
        grad_factor: extra factor on the gradient of `scale`, beside LSQ's 1 / sqrt(qmax * m), m = elements per scale.
        before: the offset a, over the trailing dimensions of `x`; None = 0.
        after: the offset c, likewise.
        sign: one number, not above 0 = codes from 0 to qmax - qmin; None = the codes are as given.

    Returns:
        The shape and dtype of `x`. Gradient of `x`: passes inside the closed range, zero outside. Gradient of `scale`: LSQ,
        straight through the floor of 1e-5.
    """
    return _LSQ.apply(x, scale, before, after, sign, Grid(qmin, qmax, axis), grad_factor)


def lsq_codes(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """Integer codes of `lsq`, in [qmin, qmax], int8 where they fit, else int16; the shape of `x`."""
    codes = (x.detach().float() / reference.step_of(scale.detach(), x.ndim, axis)).clamp(qmin, qmax).round()
    return codes.to(code_dtype(qmin, qmax))


def lsq_init_scale(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """First step from data: 2 * mean|x| / sqrt(qmax), or 4 * mean|x| / sqrt(qmax) where qmin = 0.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`.
    """
    # Equal values over this step may be ties, on either side of which a rounding error of their mean would put all of them.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return ((2 if qmin else 4) * mean_abs(x.detach(), axis, wide) / math.sqrt(qmax)).float()


def mse_init_scale(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """First step with the least squared error of fake quantization, of 57 candidates from 1/8 to 16 times `lsq_init_scale`.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`; of equally good ones the smallest.
    """
    start = lsq_init_scale(x, qmin, qmax, axis)
    factors = torch.tensor(MSE_FACTORS, device=x.device)
    zero = torch.zeros_like(start)
    steps = start.clamp(min=SCALE_FLOOR) * factors[:, None]
    errors = torch.stack([affine_error(x, step, zero, (qmin, qmax), axis, axis) for step in steps])
    return start * factors[errors.argmin(0)]
