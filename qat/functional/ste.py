"""Straight-through pieces and the two shape helpers that every per-axis quantizer needs."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.kernels.grid import group_size
from qat.kernels.reference import sum_along, view_along

__all__ = ["code_dtype", "group_size", "mean_abs", "round_ste", "sum_along", "view_along"]


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged. The value is exact: `x - x.detach()` is zero, not a rounding error."""
    return x.round().detach() + (x - x.detach())


def mean_abs(x: Tensor, axis: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean magnitude in `dtype` of every slice along `axis`: shape (x.shape[axis],), or (1,) for None."""
    return sum_along(x.to(dtype).abs(), axis) / group_size(x, axis)


def code_dtype(qmin: int, qmax: int) -> torch.dtype:
    """Smallest integer dtype that holds the codes."""
    if qmin >= -128 and qmax <= 127:
        return torch.int8
    return torch.int16 if qmin >= -(2**15) and qmax < 2**15 else torch.int32
