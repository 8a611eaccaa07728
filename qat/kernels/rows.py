"""A tensor as rows in memory: what kernels that walk through it are given."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange

# Tensors with memory of their own, which kernels may be pointed to; fake and wrapped ones have none.
PLAIN: set[type] = {Tensor, torch.nn.Parameter}


class LSQParams(NamedTuple):
    """What a kernel is given of an LSQ quantizer with its offsets; see `qat.functional.lsq`.

    Attributes:
        scale: (n,).
        before: offset before it, over the last dimensions, or None.
        after: offset after it, over the last dimensions, or None.
        sign: see `CodeRange.bounds`.
        codes: codes and axis.
        grad_factor: factor on the gradient of the scale.
    """

    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    sign: Tensor | None
    codes: CodeRange
    grad_factor: float = 1.0


def params_of(args: Any) -> tuple[Any, ...]:
    """The quantizer among the arguments of an operator, and those after it."""
    scale, before, after, sign, *codes = args[:8]
    return LSQParams(scale, before, after, sign, CodeRange(*codes)), *args[8:]


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
        if size > 1:
            if stride != expected:
                return None
            expected = size * stride
    return x.stride(-2)


def fit(dtypes: tuple[torch.dtype, ...], *tensors: Tensor | None) -> bool:
    """True for plain tensors on one device, those that are not None, in one of the dtypes each."""
    found = [x for x in tensors if x is not None]
    return all(
        type(x) in PLAIN and x.dtype in dtypes and x.device == found[0].device for x in found
    )


def rows_of(x: Tensor, q: LSQParams, *others: Tensor | None) -> Layout | None:
    """Rows of `x`, if each of them, or each of their elements, has a step, and each element of a row an offset; else None.

    Args:
        x: any shape.
        q: what quantizes it.
        others: tensors that vary as offsets do.
    """
    axis, beside = q.codes.axis, [t for t in (*q[1:3], *others) if t is not None]
    if x.ndim == 0 or not x.numel() or (axis is not None and not -x.ndim <= axis < x.ndim):
        return None
    axis = None if axis is None else axis % x.ndim
    by_column = axis == x.ndim - 1
    if axis is not None and not by_column:
        length = math.prod(x.shape[axis + 1 :])
    else:
        length = x.shape[-1] if by_column or not beside else beside[0].numel()
    steps, stride = 1 if axis is None else x.shape[axis], row_stride(x, length)
    for t in beside:
        if t.numel() != length or x.shape[x.ndim - t.ndim :] != t.shape or not t.is_contiguous():
            return None
    if stride is None or q.scale.numel() != steps or not q.scale.is_contiguous():
        return None
    return Layout(x.numel() // length, length, stride, steps, by_column)


def scaled_rows(w: Tensor, scale: Tensor) -> Layout | None:
    """Rows of `w` along its first dimension, if all is in one piece and `scale` (rows, 1, ...) has one for each; else None."""
    layout = rows_of(w, LSQParams(scale, None, None, None, CodeRange(0, 0, 0)))
    return layout if layout and w.is_contiguous() and scale.ndim == w.ndim > 1 else None
