"""The kernels on a CPU in one pass over memory each: C++ for float32 tensors.

What a function is given and what it gives is described in `gpu`; None where the tensors do not fit.
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
from qat.kernels.library import works
from qat.kernels.made import Made
from qat.kernels.rows import PLAIN, LSQParams, fit, params_of, row_stride, rows_of, scaled_rows
from qat.utils import compile_cpp

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "lsq_forward": (_P, _N, _P, _N, _N, _P, _N, _I, _P, _P, _F, _F, _I, _P, _I),
    "lsq_backward": (
        _P,
        _N,
        _P,
        _N,
        _P,
        _N,
        _N,
        _N,
        _P,
        _N,
        _I,
        _P,
        _F,
        _F,
        _I,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _I,
        _F,
        _I,
    ),
    "statsq_forward": (_P, _P, _N, _N, _P, _I, _F, _I),
    "round_blocks": (_P, _P, _P, _N, _N, _N, _F, _F, _F, _P, _I),
}


@functools.cache
def _library() -> Any:
    """The functions of cpu.cpp and blocks.cpp."""
    sources = (Path(__file__).with_name(name).read_text() for name in ("cpu.cpp", "blocks.cpp"))
    library = compile_cpp.load("".join(sources))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


@functools.cache
def available() -> bool:
    """True if there are compiled kernels that agree with `reference`; the first call compiles them."""
    grids = CodeRange(-4, 3, 1), CodeRange(-4, 3, 1, half=True)
    return works("C++", lambda: reference.agrees(lsq_forward, lsq_backward, "cpu", *grids))


def _fits(*tensors: Tensor | None) -> bool:
    return fit((torch.float32,), *tensors)


def _run(name: str, *args: Any) -> None:
    """Call a function in C++, to which tensors are pointers, and which takes the number of threads last."""
    getattr(_library(), name)(
        *[x.data_ptr() if type(x) in PLAIN else x for x in args], torch.get_num_threads()
    )


def lsq_forward(x: Tensor, *args: Any) -> Tensor | None:
    """`reference.lsq_forward`, rounded to a dtype."""
    x, (q, dtype) = x.float(), params_of(args)
    layout = rows_of(x, q) if _fits(x, *q[:4]) else None
    if layout is None:
        return None
    (rows, length, stride, *steps), out = layout, x.new_empty(x.shape)
    _run(
        "lsq_forward",
        x,
        stride,
        out,
        rows,
        length,
        q.scale,
        *steps,
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
    made: Made,
    *,
    with_after: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`reference.lsq_backward` with the gradient of `x` written to `out`, whose rows may lie apart; not through a LayerNorm or GELU."""
    grad, x = grad.float(), x.float()
    place = out if out.dtype == torch.float32 else x.new_empty(x.shape)
    layout = rows_of(x, q) if not made.is_other and _fits(x, *q[:4], grad, place) else None
    if layout is None:
        return None
    rows, length, stride, *steps = layout
    grad_stride, out_stride, is_softmax = (
        row_stride(grad, length),
        row_stride(place, length),
        bool(made.kind),
    )
    is_plain = (
        not (is_softmax or dequantized is not None)
        if layout.by_column
        else not is_softmax or length == x.shape[-1]
    )
    if grad_stride is None or out_stride is None or not is_plain:
        return None
    threads, like = torch.get_num_threads(), (q.before, q.after if with_after else None)
    errors = x.new_zeros(threads, length) if layout.by_column else x.new_empty(rows)
    sums = x.new_zeros(sum(t is not None for t in like), threads, length)
    each = iter(sums)
    y = None if dequantized is None else x.new_empty(x.shape)
    _run(
        "lsq_backward", grad, grad_stride, x, stride, place, out_stride, rows, length, q.scale, *steps, q.before, *q.codes.ends,
        q.codes.half, q.sign, errors, *(None if t is None else next(each) for t in like), q.after, y, is_softmax, made.number,
    )  # fmt: skip
    if place is not out:
        out.copy_(place)
    total = errors.sum(0) if layout.by_column else errors.view(-1, layout.steps).sum(0)
    return total, sums.sum(1).flatten(), y if y is None else y.to(dequantized)


def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor | None:
    """`reference.statsq_forward` for a scale per row, rounded to `dtype`."""
    w = w.float()
    layout = scaled_rows(w, scale) if _fits(w, scale) else None
    if layout is None:
        return None
    out = torch.empty_like(w)
    _run("statsq_forward", w, out, layout.rows, layout.length, scale, bits, TOP_CLIP)
    return out.to(dtype)


def round_blocks(x: Tensor, t: Tensor | None, grad: Tensor | None, bits: int) -> Tensor | None:
    """`reference.round_blocks`, rounded to the dtype of `x`."""
    if not x.numel():
        return None
    form, length, values = reference.block_format(t, bits), x.shape[-1], x.float().contiguous()
    upstream, out = None if grad is None else grad.float().contiguous(), torch.empty_like(values)
    _run(
        "round_blocks", values, upstream, out, x.numel() // length, length, form.block,
        2.0**-form.mantissa, 2.0**form.lowest, form.highest, t,
    )  # fmt: skip
    return out.to(x.dtype)
