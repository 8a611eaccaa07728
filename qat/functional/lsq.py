"""LSQ: learned step size quantization. Source: arXiv 1902.08153, as used by OFQ (arXiv 2302.02210).

`lsq_forward` and `lsq_backward` are the reference implementation. `qat.kernels` computes their
results in fewer passes over memory; sums may differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.functional.affine import slices_along
from qat.functional.ste import (
    check_fit,
    code_dtype,
    dequantize_nearest_,
    group_size,
    in_dtype,
    mean_abs,
    sum_along,
    view_along,
)

# Minimum step size; smaller scales are raised to this value.
SCALE_FLOOR = 1e-5
# Candidate step sizes relative to the initial step size, eight for each power of two. At 2 bits,
# finer candidates lower the error by less than 1 %.
MSE_FACTORS = tuple(2 ** (i / 8) for i in range(-24, 33))
# Finding one threshold between codes in sorted values takes as long as quantizing this many values.
SORTED_VALUES_PER_CODE = 20


class CodeRange(NamedTuple):
    """The codes of LSQ, and the dimension along which step sizes differ.

    Attributes:
        qmin: lowest code.
        qmax: highest code.
        axis: dimension along which step sizes differ; None = one step size for the tensor.
        half: True = code k stands for (k + 1/2) * s, so zero is not one of the values.
    """

    qmin: int
    qmax: int
    axis: int | None
    half: bool = False

    @property
    def ends(self) -> tuple[int, int]:
        """Clamp bounds of x / s: the outermost codes; with half steps, qmin and qmax + 1."""
        return self.qmin, self.qmax + self.half

    @property
    def floor(self) -> float:
        """Minimum step size."""
        return SCALE_FLOOR

    def nearest(self, clamped: Tensor) -> Tensor:
        """Grid values, in steps, nearest to x / s clamped to `ends`; ties go to the even code."""
        # As in the paper, clamping precedes rounding: `lsq_backward` needs the clamped values.
        if self.half:
            return (clamped - 0.5).round().clamp(max=self.qmax) + 0.5
        return clamped.round()

    def bounds(self, sign: Tensor | None) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """`ends`, or the bounds that a sign selects.

        Args:
            sign: None, or a one-element tensor: if above 0, the bounds are qmin and qmax;
                otherwise 0 and qmax - qmin. The sign is read without waiting for the device.
        """
        if sign is None:
            return self.ends
        lowest = torch.where(sign > 0, float(self.qmin), 0.0)
        return lowest, lowest + (self.qmax - self.qmin)


# A function that maps a tensor, its step sizes and a `CodeRange` to values on the grid.
Quantize = Callable[[Tensor, Tensor, CodeRange], Tensor]


class LsqGradients(NamedTuple):
    """Gradients of an LSQ quantizer; each has the shape of the tensor that it belongs to.

    `qat.kernels.operators.gradients` returns all of them, `lsq_backward` only the first four.

    Attributes:
        x: gradient of the quantizer's input; from `gradients`, of the input of the operation before
            the quantizer, if there is one.
        scale: gradient of the scale; from `lsq_backward`, without LSQ's factor 1/sqrt(qmax * m).
        before: gradient of the offset before the quantizer; None without such an offset.
        after: gradient of the offset after the quantizer; None unless requested.
        dequantized: the result of the forward pass; None unless requested.
        norm_weight: gradient of the weight of the LayerNorm before the quantizer; None without such
            a norm.
        norm_bias: gradient of the bias of this LayerNorm; None without such a norm.
    """

    x: Tensor
    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    dequantized: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def broadcast_step(scale: Tensor, ndim: int, codes: CodeRange) -> Tensor:
    """The step size max(scale, floor), broadcastable along the axis; NaN where scales are NaN."""
    return view_along(scale.float().clamp(min=codes.floor), ndim, codes.axis)


def _add_offset(x: Tensor, offset: Tensor | None) -> Tensor:
    if offset is None:
        return x.float()
    return x.float() + offset.float()


def lsq_forward(
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    codes: CodeRange,
    *,
    sign: Tensor | None = None,
) -> Tensor:
    """Fake-quantize to round(clamp((x + a) / s, qmin, qmax)) * s + c.

    With half steps, the result is (k + 1/2) * s + c for k = round((x + a) / s - 1/2), clamped to
    [qmin, qmax].

    Args:
        x: any shape and float dtype.
        scale: (x.shape[axis],), or (1,) for axis None; s = max(scale, `codes.floor`).
        before: the offset a, over the trailing dimensions of `x`; None = 0.
        after: the offset c, over the trailing dimensions of `x`; None = 0.
        codes: the codes, and the axis along which step sizes differ.
        sign: see `CodeRange.bounds`.

    Returns:
        The shape of `x`, float32.

    Raises:
        UsageError: `scale` or `before` does not fit the shape of `x`.
    """
    check_fit(x, scale, codes.axis, before)
    low, high = codes.bounds(sign)
    step = broadcast_step(scale, x.ndim, codes)
    u = _add_offset(x, before) / step
    y = codes.nearest(u.clamp(low, high)) * step  # type: ignore[arg-type]
    if after is None:
        return y
    return y + after.float()


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

    The gradient of `x` is 0 where u is outside of `codes.bounds(sign)`, else `grad`. The gradient
    of a scale is a sum over all elements with this scale: of grad * (code - u) inside the bounds,
    and of grad * code outside. With half steps, code + 1/2 replaces code.

    Args:
        grad: gradient of the result, the shape of `x`.
        x: input of the forward pass.
        scale: scale of the forward pass.
        before: offset a of the forward pass, or None.
        codes: codes of the forward pass.
        sign: sign of the forward pass, or None.
        after_shape: shape of the offset after the quantizer; None = do not compute the gradient of
            this offset.
    """
    low, high = codes.bounds(sign)
    u = _add_offset(x, before) / broadcast_step(scale, x.ndim, codes)
    grad_y = grad.float()
    # Where u is NaN, the gradient passes, just as NaN passes in the forward pass.
    grad_x = torch.where((u < low) | (u > high), 0.0, grad_y)
    # Inside the range, `clamped` equals u. It replaces u below, because `grad_x * u` would be
    # 0 * inf = NaN where u overflows.
    clamped = u.clamp(low, high)  # type: ignore[arg-type]
    return LsqGradients(
        x=grad_x,
        scale=sum_along(grad_y * codes.nearest(clamped) - grad_x * clamped, codes.axis),
        before=None if before is None else _sum_leading(grad_x, before.ndim),
        after=None if after_shape is None else _sum_leading(grad_y, len(after_shape)),
    )


def _sum_leading(x: Tensor, num_trailing: int) -> Tensor:
    """Sum over all but the trailing dimensions."""
    # Sum one dimension at a time, starting with the batch: inductor then reads consecutive rows,
    # not columns of the tensor.
    while x.ndim > num_trailing:
        x = x.sum(0)
    return x


def gradient_scale(
    x: Tensor, codes: CodeRange, grad_factor: float, sign: Tensor | None = None
) -> float | Tensor:
    """LSQ's factor on the gradient of a step size: `grad_factor` / sqrt(q * m).

    Here m is the number of elements of `x` per step size (at least 1), and q the upper bound from
    `codes.bounds`. With a sign, the result is a tensor.
    """
    _, highest = codes.bounds(sign)
    m = max(group_size(x, codes.axis), 1)
    if isinstance(highest, Tensor):
        return grad_factor / (highest * m).sqrt()
    return grad_factor / math.sqrt(highest * m)


class LSQFunction(torch.autograd.Function):
    """`lsq` with its gradient; the inputs are saved for backward, but no mask and no codes."""

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
        """Save the inputs."""
        x, scale, before, after, sign, codes, grad_factor = inputs
        ctx.codes = codes
        ctx.grad_factor = grad_factor
        ctx.save_for_backward(x, scale, before, after, sign)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`lsq_backward`, with LSQ's factor on the gradient of the scale."""
        x, scale, before, after, sign = ctx.saved_tensors
        grads = lsq_backward(
            grad,
            x,
            scale,
            before,
            ctx.codes,
            sign=sign,
            after_shape=None if after is None else after.shape,
        )
        grad_scale = None
        if ctx.needs_input_grad[1]:
            factor = gradient_scale(x, ctx.codes, ctx.grad_factor, sign)
            grad_scale = (grads.scale * factor).to(scale.dtype)
        return grads.x.to(x.dtype), grad_scale, grads.before, grads.after, None, None, None


def lsq(  # noqa: PLR0913, PLR0917  (codes, and offsets around them)
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
    """Quantize to round(clamp((x + a) / s, qmin, qmax)) * s + c with a learned step size s.

    For half steps, see `lsq_forward`.

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None, in the unit of `x`; s = max(scale, 1e-5).
        qmin: lowest code.
        qmax: highest code.
        axis: dimension along which scales differ; None = one scale for the tensor.
        grad_factor: extra factor on the gradient of `scale`, besides LSQ's 1 / sqrt(qmax * m), with
            m elements per scale. With half steps, qmax + 1 replaces qmax in this formula; if `sign`
            is at most 0, qmax - qmin replaces it.
        before: the offset a, over the trailing dimensions of `x`; None = 0.
        after: the offset c, over the trailing dimensions of `x`; None = 0.
        sign: None, or a one-element tensor: a value of at most 0 selects the codes from 0 to
            qmax - qmin.
        half: True = code k stands for (k + 1/2) * s, and x / s is clamped to [qmin, qmax + 1] (SEQ
            of ParetoQ, arXiv 2502.02631).

    Returns:
        The shape and dtype of `x`. The gradient of `x` passes inside the closed range and is zero
        outside. The gradient of `scale` is LSQ's, straight through the floor of 1e-5.

    Raises:
        UsageError: `scale` or `before` does not fit the shape of `x`.
    """
    codes = CodeRange(qmin, qmax, axis, half)
    return LSQFunction.apply(x, scale, before, after, sign, codes, grad_factor)


def lsq_codes(
    x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, *, half: bool = False
) -> Tensor:
    """Integer codes of `lsq`, in [qmin, qmax].

    The arguments are those of `lsq`; with `half`, code k stands for (k + 1/2) * s.

    Returns:
        Codes in the shape of `x`, in the smallest signed integer dtype for [qmin, qmax].
    """
    codes = CodeRange(qmin, qmax, axis, half)
    u = x.detach().float() / broadcast_step(scale.detach(), x.ndim, codes)
    nearest = codes.nearest(u.clamp(*codes.ends))
    if half:
        nearest = nearest - 0.5
    return nearest.to(code_dtype(qmin, qmax))


def relative_step(start: Tensor, change: Tensor, min_reliable: float) -> Tensor:
    """Step size s0 * exp(t), positive for every learned t.

    An initial step size s0 below u says little about the step size that is needed, so
    (u - s0) * max(t, 0) is added. Such a step size can then grow faster.

    Args:
        start: s0, (n,), in the unit of the quantized tensor.
        change: t, (n,); 0 at first.
        min_reliable: u, the smallest initial step size that is reliable; at least 0.
    """
    # Not `clamp(min=0)` of t: versions of torch differ in its gradient at 0.
    return start * change.exp() + (min_reliable - start).clamp(min=0) * change.relu()


def step_and_slope(
    start: Tensor, growth: Tensor, change: Tensor, min_reliable: float
) -> tuple[Tensor, Tensor]:
    """Return the result of `relative_step`, bit for bit, and its derivative with respect to t.

    t is `change`, and `growth` is exp(t).
    """
    # The tensors are small: an operation on two tensors takes a third of the time of an operation
    # on a tensor and a number or a bool.
    scaled_start = start * growth
    shortfall = start.clamp(min=min_reliable) - start
    positive_change = change.relu()
    # The derivative of `relu` at 0 is 0, as in torch.
    return (
        scaled_start + shortfall * positive_change,
        scaled_start + shortfall * positive_change.sign(),
    )


def min_reliable_step(qmax: int) -> float:
    """`min_reliable` for activations: 1/64 of `lsq_init_scale` of N(0, 1) values if qmin < 0."""
    return 2 * math.sqrt(2 / math.pi) / math.sqrt(qmax) / 64


def lsq_init_scale(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """Initial step size from data: 2 * mean|x| / sqrt(qmax), or twice this if qmin = 0.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`.
    """
    # Compute in float64, which MPS does not have: if all values are equal, x / step may be a tie
    # between two codes, and a rounding error of the mean would move every value to one side.
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    factor = 2 if qmin else 4
    return (factor * mean_abs(x.detach(), axis, dtype) / math.sqrt(qmax)).float()


def _fake_quantize(x: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """`lsq_forward` without offsets, for any step size above zero; allocates only one tensor."""
    step = view_along(scale, x.ndim, codes.axis)
    zero = -0.5 if codes.half else None
    return dequantize_nearest_(x / step, step, zero, codes.qmin, codes.qmax)


def _mark_possible_steps(x: Tensor, candidates: Tensor, codes: CodeRange) -> Tensor:
    """Mark the step sizes (candidates, n) that may have the least squared error of their slice.

    The errors are computed from sums over sorted values, up to rounding. Every step size is
    marked on devices other than the CPU, and if there are too many codes for sorting to save time.
    """
    rows = slices_along(x, codes.axis).contiguous()
    num_values = rows.shape[1]
    num_thresholds = codes.qmax - codes.qmin
    if x.device.type != "cpu" or num_values < SORTED_VALUES_PER_CODE * num_thresholds:
        return torch.ones_like(candidates, dtype=torch.bool)
    # NumPy sorts 20 times faster than torch.
    sorted_rows = torch.from_numpy(np.sort(rows.numpy()))
    prefix_sums = rows.new_zeros(len(rows), num_values + 1, dtype=torch.float64)
    prefix_sums[:, 1:] = sorted_rows
    prefix_sums.cumsum_(1)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    sum_of_squares = norms.square()
    step_sizes = candidates.T.double().contiguous()
    shift = 0.5 if codes.half else 0.0  # code k stands for k + shift steps
    highest = codes.qmax + shift
    # Sums of x * q and of q * q over the values x, where q * s is the quantized x. First take the
    # highest code for all values; then lower it for the values below each threshold.
    sum_xq = highest * prefix_sums[:, -1:]
    sum_qq = torch.full_like(step_sizes, highest**2 * num_values)
    for code in range(codes.qmin, codes.qmax):
        threshold = code + 0.5 + shift
        num_below = torch.searchsorted(sorted_rows, (threshold * step_sizes).float())
        sum_xq = sum_xq - prefix_sums.gather(1, num_below)
        # Without `double`, torch would multiply integers by a Python number in float32.
        sum_qq -= 2 * threshold * num_below.double()
    error = (sum_of_squares - 2 * step_sizes * sum_xq + step_sizes**2 * sum_qq).clamp(min=0)
    # Upper bound of the rounding errors of float32 and of the sums above.
    margin = 2e-5 * error + 1e-6 * (error * sum_of_squares).sqrt() + 1e-9 * sum_of_squares
    # The negation also marks step sizes whose error is NaN.
    return ~(error - margin > (error + margin).amin(1, keepdim=True)).T


def _search_step(
    x: Tensor, initial_step: Tensor, codes: CodeRange, quantize: Quantize | None
) -> Tensor:
    """The step size with the least squared error among 57 candidates around `initial_step` (n,).

    If several step sizes are equally good, the smallest is returned.
    """
    factors = torch.tensor(MSE_FACTORS, device=x.device)
    steps = torch.where(initial_step > 0, initial_step, SCALE_FLOOR) * factors[:, None]
    if codes.half:
        steps = steps.clamp(min=SCALE_FLOOR)
    # Use the plain path where a kernel would return other results: if `x` is not contiguous, sums
    # are rounded in another order, and kernels raise step sizes below `SCALE_FLOOR`.
    if quantize is None or not x.is_contiguous() or (steps < SCALE_FLOOR).any():
        quantize = _fake_quantize
    is_possible = _mark_possible_steps(x, steps, codes)
    errors = torch.where(is_possible, 0.0, torch.inf)
    # If the initial step size is zero, the result is zero, whichever candidate is the best.
    needs_error = is_possible & (is_possible.sum(0) > 1) & (initial_step > 0)
    for i in needs_error.any(1).nonzero().flatten():
        squared_error = quantize(x, steps[i], codes).sub_(x).square_()
        errors[i] = torch.where(is_possible[i], sum_along(squared_error, codes.axis), torch.inf)
    return initial_step * factors[errors.argmin(0)]


@torch.no_grad()
def mse_init_scale(
    x: Tensor, qmin: int, qmax: int, axis: int | None, quantize: Quantize | None = None
) -> Tensor:
    """Initial step size with the least squared error of fake quantization.

    There are 57 candidates, from 1/8 to 16 times `lsq_init_scale`.

    Args:
        x: any shape and float dtype.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension along which step sizes differ; None = one step size for the tensor.
        quantize: a faster function that returns the results of `lsq_forward` without offsets, in a
            new tensor; None = use the reference implementation.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`. If several step
        sizes are equally good, the smallest is returned.
    """
    initial_step = lsq_init_scale(x, qmin, qmax, axis)
    return _search_step(x.detach().float(), initial_step, CodeRange(qmin, qmax, axis), quantize)


@torch.no_grad()
def half_step_init_scale(
    x: Tensor, qmin: int, qmax: int, axis: int | None, quantize: Quantize | None = None
) -> Tensor:
    """Initial step size with the least squared error, for a grid of half steps.

    There are 57 candidates, from 1/8 to 16 times 2 * mean|x| / (qmax + 1). See `mse_init_scale`
    for the arguments.

    Returns:
        (x.shape[axis],), or (1,) for axis None, float32, in the unit of `x`. If several step
        sizes are equally good, the smallest is returned.
    """
    x = x.detach().float()
    initial_step = 2 * mean_abs(x, axis).float() / (qmax + 1)
    return _search_step(x, initial_step, CodeRange(qmin, qmax, axis, half=True), quantize)
