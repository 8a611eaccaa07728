"""Kernels for CPUs, in C++: they process float32 tensors in one pass over memory.

Functions have the arguments and results of the operators of the same name; `lsq_backward` has those
of `gpu.lsq_backward`. They return None for tensors that the kernels do not support.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.functional.statsq import TOP_CLIP
from qat.kernels import reference
from qat.kernels.library import check_kernels
from qat.kernels.producer import Producer
from qat.kernels.rows import (
    PLAIN_CLASSES,
    LSQParams,
    are_supported,
    layout_by_row,
    layout_of,
    row_stride,
    split_operator_args,
)
from qat.utils import compile_cpp

_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_FLOAT = ctypes.c_float
_INT = ctypes.c_int
# Types of the arguments in cpu.cpp and blocks.cpp; the last argument is the number of threads.
_SIGNATURES = {
    "lsq_forward": [
        *(_POINTER, _SIZE, _POINTER, _SIZE, _SIZE),  # x, its stride, y, rows, length
        *(_POINTER, _SIZE, _INT),  # scale, steps, by_column
        *(_POINTER, _POINTER),  # offsets
        *(_FLOAT, _FLOAT, _INT, _POINTER),  # low, high, half, sign
        _INT,
    ],
    "lsq_backward": [
        *(_POINTER, _SIZE, _POINTER, _SIZE),  # gradient, its stride, x, its stride
        *(_POINTER, _SIZE, _SIZE, _SIZE),  # gradient of x, its stride, rows, length
        *(_POINTER, _SIZE, _INT),  # scale, steps, by_column
        *(_POINTER, _FLOAT, _FLOAT, _INT, _POINTER),  # offset before, low, high, half, sign
        *(_POINTER, _POINTER, _POINTER),  # gradients of the scale and of both offsets
        *(_POINTER, _POINTER),  # offset after, result of the forward pass
        *(_INT, _FLOAT),  # is_softmax, factor on the scores
        _INT,
    ],
    "statsq_forward": [
        *(_POINTER, _POINTER, _SIZE, _SIZE),  # w, y, rows, length
        *(_POINTER, _INT, _FLOAT),  # scale, bits, upper clip
        _INT,
    ],
    "round_blocks": [
        *(_POINTER, _POINTER, _POINTER, _SIZE, _SIZE),  # x, gradient, y, rows, length
        *(_SIZE, _FLOAT, _FLOAT, _FLOAT),  # block, spacing, lowest, highest
        _POINTER,  # scale of the tensor
        _INT,
    ],
}


@functools.cache
def _library() -> Any:
    """The compiled functions of cpu.cpp and blocks.cpp."""
    folder = Path(__file__).parent
    source = (folder / "cpu.cpp").read_text() + (folder / "blocks.cpp").read_text()
    library = compile_cpp.load(source)
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = None
    return library


@functools.cache
def available() -> bool:
    """True if the kernels compile and agree with `reference`; the first call compiles them."""
    grids = CodeRange(-4, 3, 1), CodeRange(-4, 3, 1, half=True)
    return check_kernels(
        "C++", lambda: reference.kernels_agree(lsq_forward, lsq_backward, "cpu", *grids)
    )


def _are_supported(*tensors: Tensor | None) -> bool:
    return are_supported((torch.float32,), *tensors)


def _run(name: str, *args: Any) -> None:
    """Call a C++ function: pass tensors as pointers, and add the number of threads."""
    pointers = [x.data_ptr() if type(x) in PLAIN_CLASSES else x for x in args]
    getattr(_library(), name)(*pointers, torch.get_num_threads())


def lsq_forward(x: Tensor, *args: Any) -> Tensor | None:
    """`reference.lsq_forward`, rounded to the dtype in `args`."""
    x = x.float()
    q, dtype = split_operator_args(args)
    layout = layout_of(x, q) if _are_supported(x, *q[:4]) else None
    if layout is None:
        return None
    out = x.new_empty(x.shape)
    _run(
        "lsq_forward",
        x,
        layout.stride,
        out,
        layout.rows,
        layout.length,
        q.scale,
        layout.num_scales,
        layout.by_column,
        q.before,
        q.after,
        *q.codes.ends,
        q.codes.half,
        q.sign,
    )
    return out.to(dtype)


def lsq_backward(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    q: LSQParams,
    out: Tensor,
    dequantized: torch.dtype | None,
    weight: Tensor | None,
    bias: Tensor | None,
    producer: Producer,
    *,
    with_after: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`reference.lsq_backward`, and the backward of a softmax before the quantizer.

    The gradient of `x` is written to `out`, whose rows need not be adjacent in memory. The function
    also returns None if the input of the quantizer must be recomputed from `x`; for a softmax with
    a step size per column, or with rows of the layout that are not rows of the softmax; and if
    `dequantized` is requested with a step size per column.
    """
    grad = grad.float()
    x = x.float()
    grad_x = out if out.dtype == torch.float32 else x.new_empty(x.shape)
    if producer.needs_recompute or not _are_supported(x, *q[:4], grad, grad_x):
        return None
    layout = layout_of(x, q)
    if layout is None:
        return None
    length = layout.length
    grad_stride = row_stride(grad, length)
    grad_x_stride = row_stride(grad_x, length)
    if grad_stride is None or grad_x_stride is None:
        return None
    is_softmax = producer.kind == "softmax"
    if is_softmax and (layout.by_column or length != x.shape[-1]):
        return None
    if layout.by_column and dequantized is not None:
        return None

    num_threads = torch.get_num_threads()
    step_grads = x.new_zeros(num_threads, length) if layout.by_column else x.new_empty(layout.rows)
    has_before = q.before is not None
    has_after = with_after and q.after is not None
    sums = x.new_zeros(has_before + has_after, num_threads, length)
    y = None if dequantized is None else x.new_empty(x.shape)
    _run(
        "lsq_backward",
        grad,
        grad_stride,
        x,
        layout.stride,
        grad_x,
        grad_x_stride,
        layout.rows,
        length,
        q.scale,
        layout.num_scales,
        layout.by_column,
        q.before,
        *q.codes.ends,
        q.codes.half,
        q.sign,
        step_grads,
        sums[0] if has_before else None,
        sums[-1] if has_after else None,
        q.after,
        y,
        is_softmax,
        producer.factor,
    )
    if grad_x is not out:
        out.copy_(grad_x)
    if y is not None:
        y = y.to(dequantized)
    if layout.by_column:
        grad_scale = step_grads.sum(0)
    else:
        grad_scale = step_grads.view(-1, layout.num_scales).sum(0)
    return grad_scale, sums.sum(1).flatten(), y


def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor | None:
    """`reference.statsq_forward` for a scale per row, rounded to `dtype`."""
    w = w.float()
    layout = layout_by_row(w, scale) if _are_supported(w, scale) else None
    if layout is None:
        return None
    out = torch.empty_like(w)
    _run("statsq_forward", w, out, layout.rows, layout.length, scale, bits, TOP_CLIP)
    return out.to(dtype)


def round_blocks(
    x: Tensor, tensor_scale: Tensor | None, grad: Tensor | None, bits: int
) -> Tensor | None:
    """`reference.round_blocks`, rounded to the dtype of `x`."""
    if not x.numel():
        return None
    block_format = reference.block_format(tensor_scale, bits)
    length = x.shape[-1]
    values = x.float().contiguous()
    if grad is not None:
        grad = grad.float().contiguous()
    out = torch.empty_like(values)
    _run(
        "round_blocks",
        values,
        grad,
        out,
        x.numel() // length,
        length,
        block_format.block_size,
        2.0**-block_format.mantissa,
        2.0**block_format.min_exponent,
        block_format.max_value,
        tensor_scale,
    )
    return out.to(x.dtype)
