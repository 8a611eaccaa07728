"""Triton kernels for CUDA: one pass over memory, without waiting for the device.

Functions have the same arguments and results as the operators of the same name. They return None
for tensors whose layout or dtype the kernels do not support.
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
from qat.kernels.library import works
from qat.kernels.producer import Producer
from qat.kernels.rows import Layout, LSQParams, fit, params_of, row_stride, rows_of, scaled_rows
from qat.kernels.tiles import DTYPES, TILE, WIDEST, device_type, spaced, tiles_of

# Operations before a quantizer that need a whole row in a tile, and the largest length of the row.
WHOLE = ("norm", "scores")
LONGEST = 4096
# Number of programs in a backward pass: four per multiprocessor of a large device. Each program
# writes a row of sums.
PROGRAMS = 528
# Without floating-point fusion, `r * s + c` rounds twice, like two separate operations.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
# Compiled kernels, by everything that a kernel depends on: Triton's own lookup takes four times as
# long as a launch.
_COMPILED: dict[Any, Any] = {}


@functools.cache
def available() -> bool:
    """True if Triton and a device are present, and the kernels agree with `reference`.

    The first call compiles the kernels and waits for the device.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device_type() == "cuda" and not torch.cuda.is_available():
        return False
    grid = CodeRange(-4, 3, 1)
    return works("Triton", lambda: reference.agrees(lsq_forward, lsq_backward, device_type(), grid))


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
    kinds = [x if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors]
    key = name, device, *kinds, *numbers, *constants.values()
    with torch.cuda.device(device):
        if key in _COMPILED:
            kernel, ordered_constants = _COMPILED[key]
            kernel[*programs, 1, 1](*pointers, *numbers, *ordered_constants)
            return
        from qat.kernels import triton_attention, triton_kernels  # not every system has Triton

        source = getattr(triton_attention, name, None) or getattr(triton_kernels, name)
        kernel = source[programs](*tensors, *numbers, **{**OPTIONS, **constants})
        if kernel:
            ordered_constants = [constants[arg] for arg in source.arg_names if arg in constants]
            _COMPILED[key] = kernel, ordered_constants


def _floats(like: Tensor, *shape: int) -> Tensor:
    """A new float32 tensor on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


def lsq_forward(x: Tensor, *args: Any) -> Tensor | None:
    """`reference.lsq_forward`, rounded to the dtype in `args` when it is written."""
    q, dtype = params_of(args)
    layout = rows_of(x, q) if dtype in DTYPES and fit(DTYPES, x, *q[:4]) else None
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
        layout.steps,
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
    """The rows of `x`. Returns None if the kernel does not support these tensors."""
    if producer.kind in {"tanh", "softmax"} or dequantized not in {None, *DTYPES}:
        return None
    if not fit(DTYPES, grad, x, *q[:4], out, weight, bias):
        return None
    layout = rows_of(x, q, weight, bias)
    if layout is None:
        return None
    if producer.kind in WHOLE and not layout.length == x.shape[-1] <= LONGEST:
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
    out_stride = None if layout is None else row_stride(out, layout.length)
    if layout is None or out_stride is None:
        return None
    rows, length, stride, steps, by_column = layout
    is_whole = producer.kind in WHOLE
    block, (down, across) = tiles_of(layout, LONGEST if is_whole else None)
    grad, grad_stride = spaced(grad, length)
    # A program processes a strip of rows. Probabilities need no sums over rows, so there a strip is
    # a single tile.
    tiles_per_strip = 1 if producer.kind == "scores" else -(-down * across // PROGRAMS)
    strip = block["BLOCK_R"] * tiles_per_strip
    strips = -(-rows // strip)

    step_grads_shape = (strips, length) if by_column else (rows // steps, steps, across)
    step_grads = _floats(x, *step_grads_shape)
    after = q.after if with_after else None
    requested = tuple(t is not None for t in (q.before, after, weight, bias))
    sums = _floats(x, sum(requested), strips, length)
    y = None if dequantized is None else x.new_empty(x.shape, dtype=dequantized)
    unit = math.gcd(8, length, grad_stride, stride, out_stride)
    low, high = q.codes.ends
    _launch(
        "lsq_backward",
        (strips, across),
        (grad, x, out, *q[:4], y, step_grads, sums, weight, bias),
        float(low),
        float(high),
        rows,
        length // unit,
        grad_stride // unit,
        stride // unit,
        out_stride // unit,
        steps,
        strip,
        producer.number,
        UNIT=unit,
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
    start: Tensor, growth: Tensor, change: Tensor, unit: float
) -> tuple[Tensor, Tensor] | None:
    """The nine operations of `qat.functional.lsq.step_and_slope` in one launch."""
    if not fit((torch.float32,), start, growth, change):
        return None
    if not all(x.is_contiguous() for x in (start, growth, change)):
        return None
    step = torch.empty_like(start)
    slope = torch.empty_like(start)
    _launch(
        "step_and_slope",
        (-(-start.numel() // TILE),),
        (step, slope, start, growth, change),
        start.numel(),
        unit,
        BLOCK=TILE,
    )
    return step, slope


def statsq_forward(
    w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, *, find: bool = False
) -> Tensor | None:
    """`reference.statsq_forward` with a scale per row, rounded to `dtype` when it is written.

    With `find`, the kernel first computes the scales and writes them to `scale`.
    """
    layout = scaled_rows(w, scale) if dtype in DTYPES and fit(DTYPES, w, scale) else None
    if layout is None:
        return None
    block, (down, _) = tiles_of(layout, WIDEST)
    out = w.new_empty(w.shape, dtype=dtype)
    _launch(
        "statsq_forward",
        (down,),
        (w, out, scale),
        float(2 ** (bits - 1)),
        layout.rows,
        layout.length,
        FIND=find,
        **block,
    )
    return out


def statsq(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """StatsQ of a matrix and its scale (rows, 1), in one launch."""
    scale = _floats(w, len(w), 1)
    out = statsq_forward(w, scale, bits, dtype, find=True)
    return None if out is None else (out, scale)
