"""A tensor as rows in memory: what kernels that walk through it are given."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange

# Tensors with memory of their own, which kernels may be pointed to; fake and wrapped ones have none.
PLAIN: set[type] = {Tensor, torch.nn.Parameter}


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


def layout_of(x: Tensor, codes: CodeRange, n_offsets: int = 0) -> Layout | None:
    """The rows of `x`, (..., length); None where a kernel that walks through rows does not fit.

    Args:
        x: the tensor to quantize.
        codes: its codes.
        n_offsets: elements of the offsets, which vary over the trailing dimensions of `x`; 0 = none.
    """
    if x.ndim == 0 or (codes.axis is not None and not -x.ndim <= codes.axis < x.ndim):
        return None
    axis = None if codes.axis is None else codes.axis % x.ndim
    by_column = axis is not None and axis == x.ndim - 1
    length = math.prod(x.shape[axis + 1 :]) if axis is not None and not by_column else n_offsets or x.shape[-1]
    stride = row_stride(x, length) if length and x.numel() else None
    if stride is None or (n_offsets and n_offsets != length) or (by_column and length != x.shape[-1]):
        return None
    steps = 1 if axis is None else x.shape[axis]
    return Layout(x.numel() // length, length, stride, steps, by_column)


def rows_of(x: Tensor, scale: Tensor, offsets: list[torch.Size], codes: CodeRange) -> Layout | None:
    """Rows of `x`, if each of them, or each of their elements, has a step, and each element of a row an offset.

    Args:
        x: any shape.
        scale: the steps.
        offsets: shapes of the offsets.
        codes: codes and axis.
    """
    layout = layout_of(x, codes, math.prod(offsets[0]) if offsets else 0)
    if layout is None or scale.numel() != layout.steps:
        return None
    are_trailing = all(math.prod(shape) == layout.length and x.shape[x.ndim - len(shape) :] == shape for shape in offsets)
    return layout if are_trailing else None
