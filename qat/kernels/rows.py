"""A tensor as rows in memory: what kernels that walk through it are given."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange

# Tensors with memory of their own, which kernels may be pointed to; fake and wrapped ones have none.
PLAIN: set[type] = {Tensor, torch.nn.Parameter}


class Steps(NamedTuple):
    """What a kernel is given of an LSQ quantizer; see `qat.functional.lsq`."""

    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    sign: Tensor | None
    codes: CodeRange


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


def rows_of(x: Tensor, q: Steps, *shapes: torch.Size | None) -> Layout | None:
    """Rows of `x`, if each of them, or each of their elements, has a step, and each element of a row an offset; else None.

    Args:
        x: any shape.
        q: what quantizes it.
        shapes: of other tensors that vary as offsets do.
    """
    axis, offsets = q.codes.axis, [shape for shape in (*(t.shape for t in q[1:3] if t is not None), *shapes) if shape is not None]
    if x.ndim == 0 or not x.numel() or (axis is not None and not -x.ndim <= axis < x.ndim):
        return None
    axis = None if axis is None else axis % x.ndim
    by_column = axis == x.ndim - 1
    if axis is not None and not by_column:
        length = math.prod(x.shape[axis + 1 :])
    else:
        length = x.shape[-1] if by_column or not offsets else math.prod(offsets[0])
    steps, stride = 1 if axis is None else x.shape[axis], row_stride(x, length)
    are_trailing = all(math.prod(shape) == length and x.shape[x.ndim - len(shape) :] == shape for shape in offsets)
    if stride is None or not are_trailing or q.scale.numel() != steps:
        return None
    return Layout(x.numel() // length, length, stride, steps, by_column)
