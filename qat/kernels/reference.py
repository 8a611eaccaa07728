"""The kernels as plain tensor operations: what every other form has to give, and what `torch.compile` fuses.

Everything is computed in float32 and returned in it. Sources: LSQ, arXiv 1902.08153; StatsQ, arXiv 2302.02210.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.kernels.grid import SCALE_FLOOR, Grid

TOP_CLIP = 1 - 1e-6
# Keeps 0/0 out of an all-zero row without moving any other scale.
TINY = torch.finfo(torch.float32).tiny


def view_along(scale: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Reshape a 1-D scale so that it broadcasts against an `ndim`-dimensional tensor along `axis`; one element for None."""
    if axis is None:
        return scale.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def sum_along(x: Tensor, axis: int | None) -> Tensor:
    """Sum over every dimension but `axis`: shape (x.shape[axis],), or (1,) for None.

    Two stages, trailing dimensions first: inductor vectorises `sum(-1).sum(0)` and not `sum((0, 2))`.
    """
    if axis is None:
        return x.sum().reshape(1)
    axis %= x.ndim
    if axis < x.ndim - 1:
        x = x.flatten(axis + 1).sum(-1)
    return x.flatten(0, axis - 1).sum(0) if axis else x


def step_of(scale: Tensor, ndim: int, axis: int | None) -> Tensor:
    """The step in force, broadcasting against `ndim` dimensions. Clamp lets NaN through: a scale that was never set is no number."""
    return view_along(scale.float().clamp(min=SCALE_FLOOR), ndim, axis)


def just_outside(code: float) -> float:
    """The float32 neighbour of a whole `code` away from zero; below 0, a value too small to matter."""
    ulp = 2.0 ** (int(abs(code)).bit_length() - 24) if code else TINY
    return code + ulp if code > 0 else code - ulp


def in_range(grad: Tensor, u: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """`grad` where low <= u <= high, else 0."""
    if isinstance(low, Tensor):
        return torch.where((u >= low) & (u <= high), grad, 0.0)
    # hardtanh's open range between the neighbours of the bounds is the closed range, masked in one pass over the data.
    return torch.ops.aten.hardtanh_backward(grad, u, just_outside(low), just_outside(high))  # type: ignore[arg-type]


class LsqGradients(NamedTuple):
    """What `lsq_backward` gives.

    Attributes:
        x: the shape of the input, float32.
        scale: the shape of the scale; the gradient but for LSQ's 1/sqrt(qmax * m).
        before: the shape of the offset in front; None without one.
        after: that of the offset behind, if it was asked for.
        levels: what `lsq_forward` gave, if it was asked for.
    """

    x: Tensor
    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    levels: Tensor | None = None


def lsq_forward(x: Tensor, scale: Tensor, before: Tensor | None, after: Tensor | None, grid: Grid, *, sign: Tensor | None = None) -> Tensor:
    """round(clamp((x + a) / s, qmin, qmax)) * s + c.

    Args:
        x: any shape and float dtype.
        scale: s, (x.shape[axis],), or (1,) for axis None.
        before: a, over the trailing dimensions of `x`, or None.
        after: c, likewise.
        grid: codes and axis.
        sign: see `Grid.bounds`.

    Returns:
        The shape of `x`.
    """
    low, high = grid.bounds(sign)
    shifted = x.float() if before is None else x.float() + before.float()
    step = step_of(scale, x.ndim, grid.axis)
    y = (shifted / step).clamp(low, high).round() * step  # type: ignore[arg-type]
    return y if after is None else y + after.float()


def lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, before: Tensor | None, grid: Grid, *, sign: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `lsq_forward`.

    Args:
        grad: gradient of its result, the shape of `x`.
        x: as in the forward pass.
        scale: likewise.
        before: likewise.
        grid: likewise.
        sign: likewise.

    Returns:
        That of `x`, whose sum over the leading dimensions is that of `before`; and the shape of `scale`: the sum over a group of
        grad * (code - u), u = (x + a) / s, or of grad * code outside of the range. The gradient of the scale is that times LSQ's
        1/sqrt(qmax * m).
    """
    low, high = grid.bounds(sign)
    shifted = x.float() if before is None else x.float() + before.float()
    u = shifted / step_of(scale, x.ndim, grid.axis)
    g = grad.float()
    grad_x = in_range(g, u, low, high)
    clamped = u.clamp(low, high)  # type: ignore[arg-type]  # where u overflows, 0 * inf would be NaN; inside the range they are the same
    return grad_x, sum_along(g * clamped.round() - grad_x * clamped, grid.axis)


def _over_leading(x: Tensor, kept: int) -> Tensor:
    # The batch first: inductor then reads rows that follow each other in memory, not a column of the whole tensor at a time.
    return x if x.ndim <= kept else _over_leading(x.sum(0), kept)


def with_offsets(grad: Tensor, grad_x: Tensor, of_scale: Tensor, before: Tensor | None, after_shape: torch.Size | None) -> LsqGradients:
    """The result of `lsq_backward` with the gradients of the offsets that there are."""
    of_before = None if before is None else _over_leading(grad_x, before.ndim)
    of_after = None if after_shape is None else _over_leading(grad.float(), len(after_shape))
    return LsqGradients(grad_x, of_scale, of_before, of_after)


def lsq_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    grid: Grid,
    *,
    sign: Tensor | None = None,
    after_shape: torch.Size | None = None,
) -> LsqGradients:
    """`lsq_backward` and the gradients of the offsets; `after_shape` is that of the offset behind, if its gradient is wanted."""
    return with_offsets(grad, *lsq_backward(grad, x, scale, before, grid, sign=sign), before, after_shape)


def statsq_coordinate(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Place of `w` on the axis of codes, in [-n - 1/2, n - 1/2) with n = 2^(bits-1): rounding it gives the code."""
    n = 2 ** (bits - 1)
    u = (w.float() / scale.clamp(min=TINY)).clamp(-1.0, TOP_CLIP)
    return u * n - 0.5


def statsq_forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The level of every element: s * (k + 1/2) / 2^(bits-1).

    Args:
        w: any shape.
        scale: s, broadcasts against `w`.
        bits: 2 to 8.
    """
    return (statsq_coordinate(w, scale, bits).round() + 0.5) / 2 ** (bits - 1) * scale


def probs_backward(grad: Tensor, probs: Tensor, scale: Tensor, grid: Grid, factor: float) -> tuple[Tensor, Tensor]:
    """Gradients behind `lsq_forward(softmax(factor * scores))`.

    Args:
        grad: gradient of the quantized probabilities, (..., N, M).
        probs: the probabilities, likewise.
        scale: (N,) or (1,), as `grid.axis` says.
        grid: codes and axis.
        factor: what the scores are multiplied by in front of the softmax.

    Returns:
        The gradient of the scores, and `lsq_backward`'s sum for the scale.
    """
    inner, of_scale = lsq_backward(grad, probs, scale, None, grid)
    return (inner - (inner * probs).sum(-1, keepdim=True)) * probs * factor, of_scale
