"""Straight-through rounding, and helpers for scales along an axis."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from qat.errors import UsageError

# The smallest divisor, which avoids 0/0 in an all-zero row. Only zero and subnormal scales are
# smaller.
TINY = torch.finfo(torch.float32).tiny


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged.

    Finite values are exact, because `x - x.detach()` is then zero.
    """
    return x.round().detach() + (x - x.detach())


def nearest_codes(u: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes nearest to the coordinates `u`: rounded half to even, then clamped to [qmin, qmax]."""
    return u.round().clamp(qmin, qmax)


def dequantize_nearest_(
    u: Tensor, step: Tensor, zero: Tensor | float | None, qmin: int, qmax: int
) -> Tensor:
    """(`nearest_codes`(u + zero) - zero) * step, in place; None = a zero point of 0.

    Working in one buffer makes searches for step sizes several times faster.
    """
    if zero is not None:
        u.add_(zero)
    u.round_().clamp_(qmin, qmax)
    if zero is not None:
        u.sub_(zero)
    return u.mul_(step)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, for the result of an autograd Function.

    If `x` already has this dtype, `to` is not called: in a graph that torch 2.11 compiles, a
    conversion to the same dtype would remove the gradient.
    """
    if x.dtype == dtype:
        return x
    return x.to(dtype)


def view_along(scale: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Reshape a scale (n,) to broadcast along `axis` of `ndim` dimensions.

    The result is a scalar if `axis` is None.
    """
    if axis is None:
        return scale.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def check_fit(x: Tensor, scale: Tensor, axis: int | None, offset: Tensor | None = None) -> None:
    """Raise `UsageError` unless scales and offsets fit the shape of a tensor.

    The symbolic shapes of traced and compiled graphs are not checked.
    """
    if any(type(n) is not int for n in x.shape):
        return
    fits = axis is None or scale.numel() == 1 or scale.numel() == x.shape[axis]
    if offset is not None:
        for n, m in zip(reversed(offset.shape), reversed(x.shape), strict=False):
            fits = fits and (n == 1 or n == m)  # noqa: PLR1714 (a symbol has no hash)
    if not fits:
        raise UsageError(
            f"input of a quantizer {tuple(x.shape)}: does not fit the scales or offsets, which are "
            "stored per position; use images of the input_size given to convert, "
            "or a recipe with act_scales=tensor and offsets=false"
        )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off for the device of `x`; the meta device does not support autocast."""
    if x.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def sum_along(x: Tensor, axis: int | None) -> Tensor:
    """Sum over every dimension but `axis`: shape (x.shape[axis],), or (1,) if `axis` is None.

    Trailing dimensions are summed before leading dimensions: inductor vectorizes `sum(-1).sum(0)`,
    but not `sum((0, 2))`. The code uses `reshape` because batched gradients do not support
    `flatten`.
    """
    if axis is None:
        return x.sum().reshape(1)
    axis %= x.ndim
    if axis < x.ndim - 1:
        x = x.reshape(*x.shape[: axis + 1], math.prod(x.shape[axis + 1 :])).sum(-1)
    if axis > 0:
        x = x.reshape(math.prod(x.shape[:axis]), x.shape[-1]).sum(0)
    return x


def group_size(x: Tensor, axis: int | None) -> int:
    """Number of elements that share one scale."""
    if axis is None:
        return x.numel()
    return math.prod(x.shape) // max(x.shape[axis], 1)


def mean_abs(x: Tensor, axis: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean magnitude of slices along `axis`, computed and returned in `dtype`.

    Returns:
        (x.shape[axis],), or (1,) if `axis` is None.
    """
    return sum_along(x.to(dtype).abs(), axis) / group_size(x, axis)


def code_dtype(qmin: int, qmax: int) -> torch.dtype:
    """The smallest of int8, int16 and int32 that can represent the codes from qmin to qmax."""
    if qmin >= -128 and qmax <= 127:
        return torch.int8
    if qmin >= -(2**15) and qmax < 2**15:
        return torch.int16
    return torch.int32
