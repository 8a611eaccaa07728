"""Launchers of Triton kernels for CUDA; they do not wait for the device.

Functions have the arguments and results of the operators of the same name, except `lsq_backward`,
which describes its own. They return None if the kernels do not support the arguments.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.kernels import reference
from qat.kernels.library import check_kernels
from qat.kernels.producer import Producer
from qat.kernels.rows import (
    Layout,
    LSQParams,
    are_supported,
    layout_by_row,
    layout_of,
    row_stride,
    split_operator_args,
)
from qat.kernels.tiles import DTYPES, MAX_TILE_WIDTH, TILE, device_type, tiles_of, with_row_stride

# Operations before a quantizer that need a whole row in a tile, and the maximum length of the row.
WHOLE_ROW_KINDS = ("norm", "scores")
MAX_ROW_LENGTH = 4096
# Approximate number of programs in a backward pass with sums over rows: four per multiprocessor of
# a large device. Each program writes a row of sums.
NUM_PROGRAMS = 528
# Without floating-point fusion, `r * s + c` rounds twice, like two separate operations.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
# Compiled kernels, by everything that a kernel depends on: Triton's own lookup takes four times as
# long as a launch.
_COMPILED: dict[Any, Any] = {}


@functools.cache
def available() -> bool:
    """True if Triton is installed, and the kernels run and agree with `reference`.

    The first call may compile kernels and wait for the device.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device_type() == "cuda" and not torch.cuda.is_available():
        return False
    grid = CodeRange(-4, 3, 1)
    return check_kernels(
        "Triton", lambda: reference.kernels_agree(lsq_forward, lsq_backward, device_type(), grid)
    )


def _launch(
    name: str,
    programs: tuple[int, ...],
    tensors: tuple[Any, ...],
    *numbers: float,
    **constants: Any,
) -> None:
    """Run a kernel on tensors, numbers and constants; the first tensor must not be None."""
    device = tensors[0].get_device()  # -1 under Triton's interpreter
    pointers = [x if x is None else x.data_ptr() for x in tensors]
    tensor_kinds = [x if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors]
    key = name, device, *tensor_kinds, *numbers, *constants.values()
    with torch.cuda.device(device):
        if key in _COMPILED:
            kernel, ordered_constants = _COMPILED[key]
            kernel[*programs, 1, 1](*pointers, *numbers, *ordered_constants)
            return
        from qat.kernels import triton_attention, triton_kernels  # not every system has Triton

        kernel_function = getattr(triton_attention, name, None) or getattr(triton_kernels, name)
        kernel = kernel_function[programs](*tensors, *numbers, **{**OPTIONS, **constants})
        if kernel:
            ordered_constants = [
                constants[arg] for arg in kernel_function.arg_names if arg in constants
            ]
            _COMPILED[key] = kernel, ordered_constants


def _floats(like: Tensor, *shape: int) -> Tensor:
    """A new float32 tensor on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


def lsq_forward(x: Tensor, *args: Any) -> Tensor | None:
    """`reference.lsq_forward`; its result is rounded to the dtype in `args` when it is written."""
    q, dtype = split_operator_args(args)
    layout = layout_of(x, q) if dtype in DTYPES and are_supported(DTYPES, x, *q[:4]) else None
    if layout is None:
        return None
    block, programs = tiles_of(layout)
    out = x.new_empty(x.shape, dtype=dtype)
    low, high = q.codes.ends
    _launch(
        "lsq_forward",
        programs,
        (x, out, *q[:4]),
        float(low),
        float(high),
        layout.rows,
        layout.length,
        layout.stride,
        layout.num_scales,
        HALF=q.codes.half,
        BY_COLUMN=layout.by_column,
        **block,
    )
    return out


def _backward_layout(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    q: LSQParams,
    out: Tensor,
    dequantized: torch.dtype | None,
    weight: Tensor | None,
    bias: Tensor | None,
    producer: Producer,
) -> Layout | None:
    """The rows of `x`. Returns None if the kernel does not support the arguments."""
    if producer.kind in {"gelu_tanh", "softmax"} or dequantized not in {None, *DTYPES}:
        return None
    if not are_supported(DTYPES, grad, x, *q[:4], out, weight, bias):
        return None
    layout = layout_of(x, q, weight, bias)
    if layout is None:
        return None
    has_whole_rows = layout.length == x.shape[-1] and layout.length <= MAX_ROW_LENGTH
    if producer.kind in WHOLE_ROW_KINDS and not has_whole_rows:
        return None
    return layout


def lsq_backward(  # noqa: PLR0913, PLR0917  (one pass computes all that may be requested)
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
    """`reference.lsq_backward` and the backward of the operation before the quantizer, in one pass.

    Args:
        grad: gradient of the result of the forward pass.
        x: input of the operation before the quantizer.
        q: the quantizer.
        out: where the gradient of `x` is written, rounded to the dtype of `out`; may be `grad`.
        dequantized: dtype of the result of the forward pass to return as well; None = do not
            return it.
        weight: weight of a LayerNorm, or None.
        bias: bias of a LayerNorm, or None.
        producer: the operation before the quantizer.
        with_after: True = compute the gradient of the offset after the quantizer.

    Returns:
        The results of `operators.lsq_backward`, with None for a result of the forward pass that
        was not requested.
    """
    layout = _backward_layout(grad, x, q, out, dequantized, weight, bias, producer)
    if layout is None:
        return None
    out_stride = row_stride(out, layout.length)
    if out_stride is None:
        return None
    rows, length, stride, num_scales, by_column = layout
    needs_whole_row = producer.kind in WHOLE_ROW_KINDS
    max_length = MAX_ROW_LENGTH if needs_whole_row else None
    block, (tiles_down, tiles_across) = tiles_of(layout, max_length)
    grad, grad_stride = with_row_stride(grad, length)
    # A program processes a strip of rows. Quantizers of probabilities usually need no sums over
    # rows, so their strips are single tiles.
    from_scores = producer.kind == "scores"
    tiles_per_strip = 1 if from_scores else math.ceil(tiles_down * tiles_across / NUM_PROGRAMS)
    rows_per_strip = block["BLOCK_R"] * tiles_per_strip
    num_strips = math.ceil(rows / rows_per_strip)

    step_grads_shape: tuple[int, ...] = (rows // num_scales, num_scales, tiles_across)
    if by_column:
        step_grads_shape = (num_strips, length)
    step_grads = _floats(x, *step_grads_shape)
    after = q.after if with_after else None
    requested = tuple(t is not None for t in (q.before, after, weight, bias))
    sums = _floats(x, sum(requested), num_strips, length)
    y = None if dequantized is None else x.new_empty(x.shape, dtype=dequantized)
    # Lengths and strides are passed in units of `divisor`, so the compiler knows that they are
    # multiples of `divisor`.
    divisor = math.gcd(8, length, grad_stride, stride, out_stride)
    low, high = q.codes.ends
    _launch(
        "lsq_backward",
        (num_strips, tiles_across),
        (grad, x, out, *q[:4], y, step_grads, sums, weight, bias),
        float(low),
        float(high),
        rows,
        length // divisor,
        grad_stride // divisor,
        stride // divisor,
        out_stride // divisor,
        num_scales,
        rows_per_strip,
        producer.eps,
        producer.factor,
        UNIT=divisor,
        REQUESTED=requested,
        PRODUCER=producer.kind,
        HALF=q.codes.half,
        BY_COLUMN=by_column,
        num_warps=8,
        **block,
    )
    grad_scale = step_grads.sum(0) if by_column else step_grads.sum((0, 2))
    return grad_scale, sums.sum(1).flatten(), y


def step_and_slope(
    start: Tensor, growth: Tensor, change: Tensor, min_reliable: float
) -> tuple[Tensor, Tensor] | None:
    """The nine operations of `qat.functional.lsq.step_and_slope` in one launch."""
    if not are_supported((torch.float32,), start, growth, change):
        return None
    if not all(x.is_contiguous() for x in (start, growth, change)):
        return None
    step = torch.empty_like(start)
    slope = torch.empty_like(start)
    num_programs = math.ceil(start.numel() / TILE)
    _launch(
        "step_and_slope",
        (num_programs,),
        (step, slope, start, growth, change),
        start.numel(),
        min_reliable,
        BLOCK=TILE,
    )
    return step, slope


def statsq_forward(
    w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, *, compute_scale: bool = False
) -> Tensor | None:
    """`reference.statsq_forward` with a scale per row, rounded to `dtype` when it is written.

    With `compute_scale`, the kernel first computes the scales and writes them to `scale`.
    """
    layout = (
        layout_by_row(w, scale) if dtype in DTYPES and are_supported(DTYPES, w, scale) else None
    )
    if layout is None:
        return None
    block, (tiles_down, _) = tiles_of(layout, MAX_TILE_WIDTH)
    out = w.new_empty(w.shape, dtype=dtype)
    _launch(
        "statsq_forward",
        (tiles_down,),
        (w, out, scale),
        float(2 ** (bits - 1)),
        layout.rows,
        layout.length,
        COMPUTE_SCALE=compute_scale,
        **block,
    )
    return out


def statsq(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A matrix quantized by StatsQ, and the scale (rows, 1), in one launch."""
    scale = _floats(w, len(w), 1)
    out = statsq_forward(w, scale, bits, dtype, compute_scale=True)
    return None if out is None else (out, scale)
