"""Tensors viewed as rows in memory, as kernels expect them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange

# Classes of tensors whose memory kernels may read; fake and wrapped tensors have no memory.
PLAIN_CLASSES: set[type] = {Tensor, torch.nn.Parameter}


class LSQParams(NamedTuple):
    """An LSQ quantizer and its offsets, as kernels expect them; see `qat.functional.lsq`.

    Attributes:
        scale: step sizes (n,).
        before: offset added before quantization, over the last dimensions, or None.
        after: offset added after quantization, over the last dimensions, or None.
        sign: see `CodeRange.bounds`.
        codes: codes, and the axis along which step sizes differ.
        grad_factor: factor on the gradient of the scale, besides LSQ's own.
    """

    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    sign: Tensor | None
    codes: CodeRange
    grad_factor: float = 1.0


def operator_args(q: LSQParams) -> tuple[Any, ...]:
    """The eight arguments by which an operator takes a quantizer."""
    return q.scale, q.before, q.after, q.sign, *q.codes


def split_operator_args(args: Any) -> tuple[Any, ...]:
    """Put the first eight arguments into `LSQParams`; return it and the other arguments."""
    scale, before, after, sign, *codes = args[:8]
    return LSQParams(scale, before, after, sign, CodeRange(*codes)), *args[8:]


class Layout(NamedTuple):
    """The layout of a tensor that consists of rows of equal length.

    Attributes:
        rows: number of rows.
        length: number of elements of a row.
        stride: number of elements from the start of one row to the start of the next one.
        num_scales: number of step sizes.
        by_column: True = element i of each row has step size i; False = row r has step size
            r % num_scales.
    """

    rows: int
    length: int
    stride: int
    num_scales: int
    by_column: bool


def row_stride(x: Tensor, length: int) -> int | None:
    """Stride in elements from one row of `length` elements to the next; None if none is found."""
    if x.is_contiguous():
        return length
    if length != x.shape[-1] or x.stride(-1) != 1:
        return None
    expected_stride = x.stride(-2)
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size > 1:
            if stride != expected_stride:
                return None
            expected_stride = size * stride
    return x.stride(-2)


def are_supported(dtypes: tuple[torch.dtype, ...], *tensors: Tensor | None) -> bool:
    """True if all tensors have memory, an allowed dtype and the same device; None is skipped."""
    present = [x for x in tensors if x is not None]
    device = present[0].device
    for x in present:
        if type(x) not in PLAIN_CLASSES or x.dtype not in dtypes or x.device != device:
            return False
    return True


def _row_length(x: Tensor, axis: int | None, row_tensors: list[Tensor]) -> int:
    """Number of elements of a row of the layout.

    If the axis is before the last dimension, the elements of a row share a step size. If the axis
    is the last dimension, a row is that dimension. Without an axis, a row is as long as the first
    of `row_tensors`, or else as the last dimension.
    """
    if axis == x.ndim - 1:
        return x.shape[-1]
    if axis is not None:
        return math.prod(x.shape[axis + 1 :])
    return row_tensors[0].numel() if row_tensors else x.shape[-1]


def layout_of(x: Tensor, q: LSQParams, *others: Tensor | None) -> Layout | None:
    """Rows of `x`, each with a single step size or with a step size for each column.

    Args:
        x: any shape.
        q: the quantizer.
        others: None, or tensors with a value for each element of a row, besides the offsets.

    Returns:
        The rows; None if `x` has no such rows in memory, or if another tensor does not fit them.
    """
    axis = q.codes.axis
    row_tensors = [t for t in (q.before, q.after, *others) if t is not None]
    if x.ndim == 0 or not x.numel():
        return None
    if axis is not None:
        if not -x.ndim <= axis < x.ndim:
            return None
        axis %= x.ndim
    length = _row_length(x, axis, row_tensors)
    for t in row_tensors:
        if t.numel() != length or x.shape[x.ndim - t.ndim :] != t.shape or not t.is_contiguous():
            return None
    num_scales = 1 if axis is None else x.shape[axis]
    stride = row_stride(x, length)
    if stride is None or q.scale.numel() != num_scales or not q.scale.is_contiguous():
        return None
    return Layout(
        rows=x.numel() // length,
        length=length,
        stride=stride,
        num_scales=num_scales,
        by_column=axis == x.ndim - 1,
    )


def layout_by_row(w: Tensor, scale: Tensor) -> Layout | None:
    """Rows of a contiguous `w` along its first dimension, one for each entry of `scale`.

    Returns None if the tensors have other layouts or shapes.
    """
    # Otherwise, scales (1, N, 1) of `w` (N, N, C) could pass for scales of the first dimension.
    if not w.is_contiguous() or not scale.ndim == w.ndim > 1 or len(scale) != len(w):
        return None
    return layout_of(w, LSQParams(scale, None, None, None, CodeRange(0, 0, 0)))
