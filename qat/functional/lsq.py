"""LSQ: learned step size quantization. Source: arXiv 1902.08153, as used by OFQ (arXiv 2302.02210).

`lsq_forward` and `lsq_backward` are the formula. `qat.kernels` computes the same in fewer passes over memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.ste import code_dtype, group_size, in_dtype, mean_abs, sum_along, view_along

# A step smaller than this is taken for this.
SCALE_FLOOR = 1e-5
# In eighths of a power of two around LSQ's initial step: at 2 bits finer ones lower the error by less than 1 %.
MSE_FACTORS = tuple(2 ** (i / 8) for i in range(-24, 33))


class CodeRange(NamedTuple):
    """Which codes LSQ has, and which elements share a step.

    Attributes:
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps steps of its own, None = one for the tensor.
        half: code k stands for (k + 1/2) steps: as many values below zero as above, and none at zero.
    """

    qmin: int
    qmax: int
    axis: int | None
    half: bool = False

    @property
    def ends(self) -> tuple[int, int]:
        """Where x / s is clamped: at the outermost codes, with half steps half a step after them."""
        return self.qmin, self.qmax + self.half

    def rounded(self, clamped: Tensor) -> Tensor:
        """Values in steps: of clamped x / s the nearest one, half to even."""
        return (clamped - 0.5).round().clamp(max=self.qmax) + 0.5 if self.half else clamped.round()

    def bounds(self, sign: Tensor | None) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """`ends`, where a sign may move them.

        Args:
            sign: None, or one number: above 0 the codes are these, else as many from 0 up. Read without waiting for the device.
        """
        if sign is None:
            return self.ends
        lowest = torch.where(sign > 0, float(self.qmin), 0.0)
        return lowest, lowest + (self.qmax - self.qmin)


# Maps a tensor, its steps and codes to the values on the grid.
Quantize = Callable[[Tensor, Tensor, CodeRange], Tensor]


class LsqGradients(NamedTuple):
    """What `lsq_backward` gives.

    Attributes:
        x: the shape of the input, float32.
        scale: the shape of the scale; the gradient but for LSQ's 1/sqrt(qmax * m).
        before: the shape of the offset in front; None without one.
        after: that of the offset after it, if it was asked for.
        dequantized: what `lsq_forward` gave, if it was asked for.
        norm_weight: that of the weight of a LayerNorm in front, if the kernel went through one.
        norm_bias: that of its bias.
    """

    x: Tensor
    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    dequantized: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def step_of(scale: Tensor, ndim: int, axis: int | None) -> Tensor:
    """The step in force, broadcasting against `ndim` dimensions. Clamp lets NaN through: a scale that was never set stays NaN."""
    return view_along(scale.float().clamp(min=SCALE_FLOOR), ndim, axis)


def lsq_forward(
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    codes: CodeRange,
    *,
    sign: Tensor | None = None,
) -> Tensor:
    """round(clamp((x + a) / s, qmin, qmax)) * s + c, or, with half steps, (k + 1/2) * s + c, k = round((x + a) / s - 1/2) clamped.

    Args:
        x: any shape and float dtype.
        scale: s, (x.shape[axis],), or (1,) for axis None.
        before: a, over the trailing dimensions of `x`, or None.
        after: c, over the trailing dimensions of `x`, or None.
        codes: the codes and their axis.
        sign: see `CodeRange.bounds`.

    Returns:
        The shape of `x`.
    """
    low, high = codes.bounds(sign)
    shifted = x.float() if before is None else x.float() + before.float()
    step = step_of(scale, x.ndim, codes.axis)
    y = codes.rounded((shifted / step).clamp(low, high)) * step  # type: ignore[arg-type]
    return y if after is None else y + after.float()


def lsq_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    codes: CodeRange,
    *,
    sign: Tensor | None = None,
    after_shape: torch.Size | None = None,
) -> LsqGradients:
    """Gradients of `lsq_forward`, straight through the rounding, with u = (x + a) / s.

    That of `x` is `grad` where u is in the closed range, else 0; that of the scale is the sum over a group of grad * (code - u), or of
    grad * code outside of the range; with half steps, code + 1/2 for code.

    Args:
        grad: gradient of its result, the shape of `x`.
        x: as in the forward pass.
        scale: as in the forward pass.
        before: as in the forward pass.
        codes: as in the forward pass.
        sign: as in the forward pass.
        after_shape: the shape of the offset after it, if its gradient is wanted.
    """
    low, high = codes.bounds(sign)
    shifted = x.float() if before is None else x.float() + before.float()
    u = shifted / step_of(scale, x.ndim, codes.axis)
    g = grad.float()
    of_x = torch.where((u < low) | (u > high), 0.0, g)  # NaN passes, as in the forward pass
    clamped = u.clamp(low, high)  # type: ignore[arg-type]  # where u overflows, 0 * inf would be NaN; inside the range they are the same
    of_scale = sum_along(g * codes.rounded(clamped) - of_x * clamped, codes.axis)
    of_before = None if before is None else _over_leading(of_x, before.ndim)
    of_after = None if after_shape is None else _over_leading(g, len(after_shape))
    return LsqGradients(of_x, of_scale, of_before, of_after)


def _over_leading(x: Tensor, kept: int) -> Tensor:
    # The batch first: inductor then reads rows that follow each other in memory, not a column of the whole tensor at a time.
    return x if x.ndim <= kept else _over_leading(x.sum(0), kept)


def gradient_scale(
    x: Tensor, codes: CodeRange, grad_factor: float, sign: Tensor | None = None
) -> float | Tensor:
    """LSQ's factor on the gradient of a step: `grad_factor` / sqrt(q * m), m = elements of `x` per step, q = upper end of `codes`."""
    _, highest = codes.bounds(sign)
    m = max(group_size(x, codes.axis), 1)
    return grad_factor / (
        (highest * m).sqrt() if isinstance(highest, Tensor) else math.sqrt(highest * m)
    )


class LSQFunction(torch.autograd.Function):
    """Keeps the input and its parameters for backward, no mask and no codes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        before: Tensor | None,
        after: Tensor | None,
        sign: Tensor | None,
        codes: CodeRange,
        grad_factor: float,
    ) -> Tensor:
        """`lsq_forward`, in the dtype of `x`."""
        return in_dtype(lsq_forward(x, scale, before, after, codes, sign=sign), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """What backward needs."""
        x, scale, before, after, sign, ctx.codes, ctx.grad_factor = inputs
        ctx.save_for_backward(x, scale, before, after, sign)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`lsq_backward`, that of the scale times LSQ's factor."""
        x, scale, before, after, sign = ctx.saved_tensors
        found = lsq_backward(
            grad,
            x,
            scale,
            before,
            ctx.codes,
            sign=sign,
            after_shape=None if after is None else after.shape,
        )
        of_scale = (
            (found.scale * gradient_scale(x, ctx.codes, ctx.grad_factor, sign)).to(scale.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
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
    half: bool = False,
) -> Tensor:
    """Quantize to round(clamp((x + a) / s, qmin, qmax)) * s + c with a learned step s = max(scale, 1e-5).

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None, in the unit of `x`.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own, None = one for the tensor.
        grad_factor: extra factor on the gradient of `scale`, beside LSQ's 1 / sqrt(qmax * m), m = elements per scale; with half steps
            (qmax + 1) for qmax.
        before: the offset a, over the trailing dimensions of `x`; None = 0.
        after: the offset c, over the trailing dimensions of `x`; None = 0.
        sign: one number, not above 0 = codes from 0 to qmax - qmin; None = the codes are as given.
        half: code k stands for (k + 1/2) * s, and x / s is clamped to [qmin, qmax + 1] (SEQ of ParetoQ, arXiv 2502.02631).

    Returns:
        The shape and dtype of `x`. Gradient of `x`: passes inside the closed range, zero outside. Gradient of `scale`: LSQ,
        straight through the floor of 1e-5.
    """
    return LSQFunction.apply(
        x, scale, before, after, sign, CodeRange(qmin, qmax, axis, half), grad_factor
    )


def lsq_codes(
    x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, *, half: bool = False
) -> Tensor:
    """Integer codes of `lsq`, in [qmin, qmax], int8 where they fit, else int16; the shape of `x`."""
    codes = CodeRange(qmin, qmax, axis, half)
    found = codes.rounded(
        (x.detach().float() / step_of(scale.detach(), x.ndim, axis)).clamp(*codes.ends)
    )
    return (found - 0.5 if half else found).to(code_dtype(qmin, qmax))


def relative_step(start: Tensor, change: Tensor, unit: float) -> Tensor:
    """A step by its start s0 and what is learned of it, t: s0 * exp(t), and above zero for every t.

    Where s0 is less than a unit u, which says next to nothing of the step that is needed, it grows by units: + (u - s0) * max(t, 0).

    Args:
        start: s0, (n,), in the unit of what is quantized.
        change: t, (n,); 0 = as it began.
        unit: u, at least 0.
    """
    return (
        start * change.exp() + (unit - start).clamp(min=0) * change.relu()
    )  # at 0 no version of torch lets a gradient through relu


def step_and_slope(
    start: Tensor, growth: Tensor, change: Tensor, unit: float
) -> tuple[Tensor, Tensor]:
    """`relative_step`, the same bits, and its derivative by the change; `growth` = exp(t)."""
    # Small tensors: operations between them take a third of the time of those with a number or a truth value.
    grown, lacking, more = start * growth, start.clamp(min=unit) - start, change.relu()
    return (
        grown + lacking * more,
        grown + lacking * more.sign(),
    )  # as torch differentiates relu: no gradient passes at 0


def least_unit(qmax: int) -> float:
    """A 64th of LSQ's first step for normal values of unit variance: the unit of activations that begin with less."""
    return 2 * math.sqrt(2 / math.pi) / math.sqrt(qmax) / 64


def lsq_init_scale(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """Initial step size from data: 2 * mean|x| / sqrt(qmax), or 4 * mean|x| / sqrt(qmax) where qmin = 0.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`.
    """
    # Equal values over this step may be ties, on either side of which a rounding error of their mean would put all of them.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return ((2 if qmin else 4) * mean_abs(x.detach(), axis, wide) / math.sqrt(qmax)).float()


def _rounded_in_place(x: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """`lsq_forward` without offsets in one new tensor, for any step above zero."""
    step = view_along(scale, x.ndim, codes.axis)
    u = x / step
    if not codes.half:
        return u.round_().clamp_(codes.qmin, codes.qmax).mul_(step)
    u.clamp_(*codes.ends).sub_(0.5).round_().clamp_(max=codes.qmax)
    return u.add_(0.5).mul_(step)


def _least_error(x: Tensor, start: Tensor, codes: CodeRange, quantize: Quantize | None) -> Tensor:
    """The one of 57 candidates around `start` (n,) with the least squared error; of equally good ones the smallest."""
    factors = torch.tensor(MSE_FACTORS, device=x.device)
    steps = start.clamp(min=SCALE_FLOOR) * factors[:, None]
    if codes.half:
        steps = steps.clamp(min=SCALE_FLOOR)
    # Sums depend on the layout, and kernels take no step below the floor.
    if quantize is None or not x.is_contiguous() or (steps < SCALE_FLOOR).any():
        quantize = _rounded_in_place
    errors = torch.stack([
        sum_along(quantize(x, step, codes).sub_(x).square_(), codes.axis) for step in steps
    ])
    return start * factors[errors.argmin(0)]


@torch.no_grad()
def mse_init_scale(
    x: Tensor, qmin: int, qmax: int, axis: int | None, quantize: Quantize | None = None
) -> Tensor:
    """Initial step size with the least squared error of fake quantization, of 57 candidates from 1/8 to 16 times `lsq_init_scale`.

    Args:
        x: any shape and float dtype.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps steps of its own, None = one for the tensor.
        quantize: a faster form of `lsq_forward` without offsets, with the same values in a new tensor.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`; of equally good ones the smallest.
    """
    start = lsq_init_scale(x, qmin, qmax, axis)
    return _least_error(x.detach().float(), start, CodeRange(qmin, qmax, axis), quantize)


@torch.no_grad()
def half_step_init_scale(
    x: Tensor, qmin: int, qmax: int, axis: int | None, quantize: Quantize | None = None
) -> Tensor:
    """Initial step size of half steps with the least squared error, of 57 candidates from 1/8 to 16 times 2 * mean|x| / n, n = qmax + 1.

    Args: those of `mse_init_scale`.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`; of equally good ones the smallest.
    """
    x = x.detach().float()
    start = 2 * mean_abs(x, axis).float() / (qmax + 1)
    return _least_error(x, start, CodeRange(qmin, qmax, axis, half=True), quantize)
