"""Where the codes of a tensor lie, and which of its elements share a step: what every kernel of LSQ is told."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A step smaller than this is taken for this.
SCALE_FLOOR = 1e-5


def group_size(x: Tensor, axis: int | None) -> int:
    """Number of elements that share one scale."""
    return x.numel() if axis is None else math.prod(x.shape) // max(x.shape[axis], 1)


class Grid(NamedTuple):
    """The grid of an LSQ quantizer.

    Attributes:
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps steps of its own, None = one for the tensor.
    """

    qmin: int
    qmax: int
    axis: int | None

    def bounds(self, sign: Tensor | None) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """Lowest and highest code.

        Args:
            sign: None, or one number: above 0 the codes are the grid's, else as many from 0 up. Read without waiting for the device.
        """
        if sign is None:
            return self.qmin, self.qmax
        lowest = torch.where(sign > 0, float(self.qmin), 0.0)
        return lowest, lowest + (self.qmax - self.qmin)


class Layout(NamedTuple):
    """A tensor seen as rows, all of them of one length, for kernels that walk through memory.

    Attributes:
        rows: number of rows.
        length: elements of a row.
        stride: elements from one row's beginning to the next one's.
        steps: number of steps; row r has step r % steps, or, with `by_column`, element i of any row has step i.
        by_column: see `steps`.
    """

    rows: int
    length: int
    stride: int
    steps: int
    by_column: bool


def row_stride(x: Tensor, length: int) -> int | None:
    """Elements from one row of `length` elements to the next, None where `x` is no sequence of rows with equal distances."""
    if x.is_contiguous():
        return length
    if length != x.shape[-1] or x.stride(-1) != 1:
        return None
    expected = x.stride(-2)
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size > 1 and stride != expected:
            return None
        expected = size * stride if size > 1 else expected
    return x.stride(-2)


def layout_of(x: Tensor, grid: Grid, n_offsets: int = 0) -> Layout | None:
    """The rows of `x`, (..., length); None where a kernel that walks through rows does not fit.

    Args:
        x: the tensor to quantize.
        grid: its grid.
        n_offsets: elements of the offsets, which vary over the trailing dimensions of `x`; 0 = none.
    """
    if x.ndim == 0 or (grid.axis is not None and not -x.ndim <= grid.axis < x.ndim):
        return None
    axis = None if grid.axis is None else grid.axis % x.ndim
    by_column = axis is not None and axis == x.ndim - 1
    length = math.prod(x.shape[axis + 1 :]) if axis is not None and not by_column else n_offsets or x.shape[-1]
    stride = row_stride(x, length) if length and x.numel() else None
    if stride is None or (n_offsets and n_offsets != length) or (by_column and length != x.shape[-1]):
        return None
    steps = 1 if axis is None else x.shape[axis]
    return Layout(x.numel() // length, length, stride, steps, by_column)


def rows_of(x: Tensor, scale: Tensor, offsets: list[torch.Size], grid: Grid) -> Layout | None:
    """Rows of `x`, if each of them, or each of their elements, has a step, and each element of a row an offset.

    Args:
        x: any shape.
        scale: the steps.
        offsets: shapes of the offsets.
        grid: codes and axis.
    """
    layout = layout_of(x, grid, math.prod(offsets[0]) if offsets else 0)
    if layout is None or scale.numel() != layout.steps:
        return None
    are_trailing = all(math.prod(shape) == layout.length and x.shape[x.ndim - len(shape) :] == shape for shape in offsets)
    return layout if are_trailing else None
