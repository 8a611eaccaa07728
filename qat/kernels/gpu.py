"""The kernels on CUDA in one pass over memory each: Triton. Nothing in them waits for the device.

What a function is given and what it gives is described in `reference`; None where the tensors do not fit.
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
from qat.kernels.made import Made
from qat.kernels.rows import LSQParams, fit, params_of, row_stride, rows_of, scaled_rows
from qat.kernels.tiles import DTYPES, TILE, WIDEST, device_type, spaced, tiles_of

# Rows that a LayerNorm or a softmax gave are held whole.
WHOLE, LONGEST = ("norm", "scores"), 4096
# Programs of a backward pass that leave rows of sums to be added: four for every multiprocessor of a large device.
PROGRAMS = 528
# Without fusion `r * s + c` rounds twice, as it does in two operations.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
# Compiled kernels by all that they depend on. To find one, Triton takes four times as long as to launch it.
_COMPILED: dict[Any, Any] = {}


@functools.cache
def available() -> bool:
    """True if Triton and a device are there and agree with `reference`. The first call compiles, and waits for the device."""
    if importlib.util.find_spec("triton") is None or (
        device_type() == "cuda" and not torch.cuda.is_available()
    ):
        return False
    return works(
        "Triton",
        lambda: reference.agrees(lsq_forward, lsq_backward, device_type(), CodeRange(-4, 3, 1)),
    )


def _launch(
    name: str,
    programs: tuple[int, ...],
    tensors: tuple[Any, ...],
    *numbers: float,
    **constants: Any,
) -> None:
    """Run the kernel of a name, whose arguments are tensors, of which the first is there, then numbers and constants."""
    device = tensors[0].get_device()  # -1, which is none, in the interpreter
    pointers = [x if x is None else x.data_ptr() for x in tensors]
    kinds = [x if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors]
    key = name, device, *kinds, *numbers, *constants.values()
    with torch.cuda.device(device):
        if key in _COMPILED:
            kernel, rest = _COMPILED[key]
            kernel[*programs, 1, 1](*pointers, *numbers, *rest)
            return
        from qat.kernels import triton_attention, triton_kernels  # not every system has Triton

        source = getattr(triton_attention, name, None) or getattr(triton_kernels, name)
        kernel = source[programs](*tensors, *numbers, **{**OPTIONS, **constants})
        if kernel:
            _COMPILED[key] = (
                kernel,
                [constants[name] for name in source.arg_names if name in constants],
            )


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def lsq_forward(x: Tensor, *args: Any) -> Tensor | None:
    """`reference.lsq_forward`, rounded as it is written; arguments are the operator's."""
    q, dtype = params_of(args)
    layout = rows_of(x, q) if dtype in DTYPES and fit(DTYPES, x, *q[:4]) else None
    if layout is None:
        return None
    (block, programs), out = tiles_of(layout), x.new_empty(x.shape, dtype=dtype)
    _launch(
        "lsq_forward", programs, (x, out, *q[:4]), *map(float, q.codes.ends), *layout[:4],
        HALF=q.codes.half, BY_COLUMN=layout.by_column, **block,
    )  # fmt: skip
    return out


def lsq_backward(  # noqa: PLR0913, PLR0917  (one pass gives all that may be wanted)
    grad: Tensor,
    x: Tensor,
    q: LSQParams,
    out: Tensor,
    dequantized: torch.dtype | None,
    weight: Tensor | None,
    bias: Tensor | None,
    made: Made,
    *,
    with_after: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`reference.lsq_backward` of what `x` was made into, and more, in one pass.

    Args:
        grad: gradient of the result of the forward pass.
        x: what its input was made of.
        q: the quantizer.
        out: takes the gradient of `x`, which is rounded to its dtype; may be `grad`.
        dequantized: the dtype in which to give the result of the forward pass as well; None = not.
        weight: of a LayerNorm.
        bias: of a LayerNorm.
        made: how the input was made.
        with_after: whether the gradient of the offset after it is wanted.

    Returns:
        What the operator gives.
    """
    fits = (
        made.kind not in {"tanh", "softmax"}
        and dequantized in {None, *DTYPES}
        and fit(DTYPES, grad, x, *q[:4], out, weight, bias)
    )
    layout = rows_of(x, q, weight, bias) if fits else None
    out_stride = None if layout is None else row_stride(out, layout.length)
    is_whole = made.kind in WHOLE
    if (
        layout is None
        or out_stride is None
        or (is_whole and not layout.length == x.shape[-1] <= LONGEST)
    ):
        return None
    rows, length, stride, steps, by_column = layout
    (block, (down, across)), (grad, grad_stride) = (
        tiles_of(layout, LONGEST if is_whole else None),
        spaced(grad, length),
    )
    # Nothing is summed up over rows of probabilities.
    strip = block["BLOCK_R"] * (1 if made.kind == "scores" else -(-down * across // PROGRAMS))
    strips = -(-rows // strip)
    errors = _floats(x, strips, length) if by_column else _floats(x, rows // steps, steps, across)
    wanted = tuple(t is not None for t in (q.before, q.after if with_after else None, weight, bias))
    sums = _floats(x, sum(wanted), strips, length)
    y = None if dequantized is None else x.new_empty(x.shape, dtype=dequantized)
    lengths = length, grad_stride, stride, out_stride
    unit = math.gcd(8, *lengths)
    _launch(
        "lsq_backward", (strips, across), (grad, x, out, *q[:4], y, errors, sums, weight, bias),
        *map(float, q.codes.ends), rows, *(n // unit for n in lengths), steps, strip, made.number,
        UNIT=unit, WANTED=wanted, MADE=made.kind, HALF=q.codes.half, BY_COLUMN=by_column, num_warps=8, **block,
    )  # fmt: skip
    return errors.sum(0) if by_column else errors.sum((0, 2)), sums.sum(1).flatten(), y


def step_and_slope(
    start: Tensor, growth: Tensor, change: Tensor, unit: float
) -> tuple[Tensor, Tensor] | None:
    """`qat.functional.lsq.step_and_slope`, in one launch, where its operations are nine."""
    if not (
        fit((torch.float32,), start, growth, change)
        and all(x.is_contiguous() for x in (start, growth, change))
    ):
        return None
    step, slope = torch.empty_like(start), torch.empty_like(start)
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
    """`reference.statsq_forward` for a scale per row, rounded to `dtype` as it is written; `find` writes `scale` first."""
    layout = scaled_rows(w, scale) if dtype in DTYPES and fit(DTYPES, w, scale) else None
    if layout is None:
        return None
    (block, programs), out = tiles_of(layout, WIDEST), w.new_empty(w.shape, dtype=dtype)
    _launch(
        "statsq_forward",
        programs[:1],
        (w, out, scale),
        float(2 ** (bits - 1)),
        *layout[:2],
        FIND=find,
        **block,
    )
    return out


def statsq(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """StatsQ of a matrix, and its scale, in one launch."""
    scale = _floats(w, len(w), 1)
    out = statsq_forward(w, scale, bits, dtype, find=True)
    return None if out is None else (out, scale)
