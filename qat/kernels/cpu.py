"""The kernels on a CPU in one pass over memory each: C++ for float32 tensors."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.functional.statsq import TOP_CLIP
from qat.kernels import compile_cpp, reference
from qat.kernels.rows import Layout, Steps, row_stride, rows_of

log = logging.getLogger(__name__)

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float, ctypes.c_int
# Of what C++ writes into; torch's default dtype and device may be others.
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_SIGNATURES = {
    "lsq_forward": (_P, _N, _P, _N, _N, _P, _N, _I, _P, _P, _F, _F, _I, _P, _I),
    "lsq_backward": (_P, _N, _P, _N, _P, _N, _N, _N, _P, _N, _I, _P, _F, _F, _I, _P, _P, _P, _P, _P, _P, _I),
    "statsq_forward": (_P, _P, _N, _N, _P, _I, _F, _I),
    "probs_backward": (_P, _P, _P, _N, _N, _P, _N, _F, _F, _F, _P, _P, _I),
}


@functools.cache
def _library() -> Any:
    """The functions of cpu.cpp, None where they cannot be had."""
    try:
        library = compile_cpp.load(Path(__file__).with_name("cpu.cpp").read_text())
    except (OSError, subprocess.SubprocessError) as error:
        log.info("quantizers take several passes over memory: no compiled kernels (%s)", error)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    if _agrees(library):
        return library
    log.info("quantizers take several passes over memory: the compiled kernels give other bits here")
    return None


@torch.no_grad()
def _agrees(library: Any) -> bool:
    """Bit for bit, for values in and out of range and halfway between codes."""
    x = torch.linspace(-9, 9, 4 * 37 * 3, **_FLOATS).reshape(3, 4, 37)
    scale, offset = torch.tensor([0.5, 1.0, 0.3, torch.nan], **_FLOATS), torch.linspace(-1, 1, 37, **_FLOATS)
    for codes in (CodeRange(-4, 3, 1), CodeRange(-4, 3, 1, half=True)):
        ours = _forward(library, x, Steps(scale, offset, offset, None, codes))
        expected = reference.lsq_forward(x, scale, offset, offset, codes)
        if ours is None or not torch.equal(ours.nan_to_num(77.0), expected.nan_to_num(77.0)):
            return False
    return True


def available() -> bool:
    """True if there are compiled kernels; the first call compiles them."""
    return _library() is not None


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _fits(*tensors: Tensor | None) -> bool:
    for x in tensors:  # noqa: SIM110  (a generator takes twice as long, which counts for small nets)
        if x is not None and not (x.dtype == torch.float32 and x.is_cpu):
            return False
    return True


def _dense(*tensors: Tensor | None) -> bool:
    for x in tensors:  # noqa: SIM110  (as above)
        if x is not None and not x.is_contiguous():
            return False
    return True


def _layout(x: Tensor, q: Steps, after_shape: torch.Size | None = None) -> Layout | None:
    """Rows of `x`; the kernels trust it that each has a step and each element an offset, and read what lies after where it has none."""
    return rows_of(x, q, after_shape) if _fits(x, *q[:4]) and _dense(*q[:3]) else None


def _forward(library: Any, x: Tensor, q: Steps) -> Tensor | None:
    layout = _layout(x, q)
    if layout is None:
        return None
    rows, length, stride, steps, by_column = layout
    out = torch.empty(x.shape, **_FLOATS)
    library.lsq_forward(
        x.data_ptr(), stride, out.data_ptr(), rows, length, q.scale.data_ptr(), steps, by_column,
        _pointer(q.before), _pointer(q.after), *q.codes.ends, q.codes.half, _pointer(q.sign), torch.get_num_threads(),
    )  # fmt: skip
    return out


def lsq_forward(x: Tensor, q: Steps, dtype: torch.dtype) -> Tensor | None:
    """`reference.lsq_forward`, rounded to `dtype`; None where it does not fit."""
    library = _library()
    made = None if library is None else _forward(library, x.float(), q)
    return None if made is None else made.to(dtype)


def lsq_backward(
    grad: Tensor, x: Tensor, q: Steps, after_shape: torch.Size | None, out: Tensor, dequantized: torch.dtype | None
) -> tuple[Tensor | None, ...] | None:
    """`reference.lsq_backward` with the gradient of `x` written to `out`, whose rows may lie apart; None where it does not fit.

    Returns:
        Gradients of scale and offsets, and what the forward pass gave in the dtype `dequantized`; None for what is not wanted.
    """
    grad, x = grad.float(), x.float()
    place = out if out.dtype == torch.float32 else torch.empty(x.shape, **_FLOATS)
    library, layout = _library(), _layout(x, q, after_shape)
    if library is None or layout is None or not _fits(grad, place) or (layout.by_column and dequantized is not None):
        return None
    rows, length, stride, steps, by_column = layout
    grad_stride, out_stride = row_stride(grad, length), row_stride(place, length)
    if grad_stride is None or out_stride is None:
        return None
    threads = torch.get_num_threads()
    errors = torch.zeros(threads, length, **_FLOATS) if by_column else torch.empty(rows, **_FLOATS)
    shapes = None if q.before is None else q.before.shape, after_shape
    sums = [None if shape is None else torch.zeros(threads, length, **_FLOATS) for shape in shapes]
    made = None if dequantized is None else torch.empty(x.shape, **_FLOATS)
    library.lsq_backward(
        grad.data_ptr(), grad_stride, x.data_ptr(), stride, place.data_ptr(), out_stride, rows, length, q.scale.data_ptr(), steps,
        by_column, _pointer(q.before), *q.codes.ends, q.codes.half, _pointer(q.sign), errors.data_ptr(), *map(_pointer, sums),
        _pointer(q.after), _pointer(made), threads,
    )  # fmt: skip
    if place is not out:
        out.copy_(place)
    total = errors.sum(0) if by_column else errors.view(-1, steps).sum(0)
    offsets = (None if s is None or shape is None else s.sum(0).view(shape) for s, shape in zip(sums, shapes, strict=True))
    return total, *offsets, made if made is None else made.to(dequantized)


def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor | None:
    """`reference.statsq_forward` for a scale per row, rounded to `dtype`; None where it does not fit."""
    library, w = _library(), w.float()
    if library is None or not w.numel() or not (_fits(w, scale) and _dense(w, scale)) or scale.shape != (w.shape[0], *[1] * (w.ndim - 1)):
        return None
    out = torch.empty_like(w)
    rows, threads = w.shape[0], torch.get_num_threads()
    library.statsq_forward(w.data_ptr(), out.data_ptr(), rows, w.numel() // rows, scale.data_ptr(), bits, TOP_CLIP, threads)
    return out.to(dtype)


def probs_backward(
    grad: Tensor, probs: Tensor, scale: Tensor, codes: CodeRange, factor: float, out: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """`reference.probs_backward` with the gradient of the scores written to `out`, which may be `grad`.

    Returns:
        The sum for the scale, and the quantized probabilities in `dtype`; None where it does not fit.
    """
    grad, probs = grad.float(), probs.float()
    place = out if out.dtype == torch.float32 else torch.empty(probs.shape, **_FLOATS)
    library, layout = _library(), _layout(probs, Steps(scale, None, None, None, codes))
    if library is None or layout is None or not (_fits(grad, place) and _dense(grad, probs, place)):
        return None
    rows, length, _, steps, by_column = layout
    if codes.half or by_column or length != probs.shape[-1]:
        return None
    errors, dequantized = torch.empty(rows, **_FLOATS), torch.empty(probs.shape, **_FLOATS)
    library.probs_backward(
        grad.data_ptr(), probs.data_ptr(), place.data_ptr(), rows, length, scale.data_ptr(), steps,
        codes.qmin, codes.qmax, factor, errors.data_ptr(), dequantized.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if place is not out:
        out.copy_(place)
    return errors.view(-1, steps).sum(0), dequantized.to(dtype)
