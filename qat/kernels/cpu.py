"""The kernels on a CPU in one pass over memory each: C++ for float32 tensors outside of `torch.compile`."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.functional.statsq import TOP_CLIP
from qat.kernels import compile_cpp, reference
from qat.kernels.rows import Layout, row_stride, rows_of

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
        ours = _forward(library, x, scale, offset, offset, codes, None)
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


def _layout(
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    codes: CodeRange,
    sign: Tensor | None,
    after_shape: torch.Size | None = None,
) -> Layout | None:
    """Rows of `x`; the kernels trust it that each has a step and each element an offset, and read what lies after where it has none."""
    if not (_fits(x, scale, before, after, sign) and _dense(scale, before, after)):
        return None
    shapes = [before.shape if before is not None else None, after.shape if after is not None else None, after_shape]
    return rows_of(x, scale, [shape for shape in shapes if shape is not None], codes)


def _forward(
    library: Any, x: Tensor, scale: Tensor, before: Tensor | None, after: Tensor | None, codes: CodeRange, sign: Tensor | None
) -> Tensor | None:
    layout = _layout(x, scale, before, after, codes, sign)
    if layout is None:
        return None
    rows, length, stride, steps, by_column = layout
    out = torch.empty(x.shape, **_FLOATS)
    library.lsq_forward(
        x.data_ptr(), stride, out.data_ptr(), rows, length, scale.data_ptr(), steps, by_column,
        _pointer(before), _pointer(after), *codes.ends, codes.half, _pointer(sign), torch.get_num_threads(),
    )  # fmt: skip
    return out


def lsq_forward(
    x: Tensor, scale: Tensor, before: Tensor | None, after: Tensor | None, codes: CodeRange, sign: Tensor | None
) -> Tensor | None:
    """`reference.lsq_forward`, None where it does not fit."""
    library = _library()
    return None if library is None else _forward(library, x, scale, before, after, codes, sign)


class Wanted(NamedTuple):
    """What `lsq_backward` is to give beside the gradient of `x`.

    Attributes:
        sum_x: the sum of that gradient over the leading dimensions, down to rows.
        after_shape: of the offset after it, if that of `grad` is wanted.
        dequantized: what the forward pass gave.
        after: the offset after it, for `dequantized`.
    """

    sum_x: bool
    after_shape: torch.Size | None
    dequantized: bool
    after: Tensor | None


def lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, before: Tensor | None, codes: CodeRange, sign: Tensor | None, out: Tensor, wanted: Wanted
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """`reference.lsq_backward` with the gradient of `x` written to `out`, None where it does not fit.

    Args:
        grad: gradient of the result of the forward pass.
        x: as in the forward pass.
        scale: as in the forward pass.
        before: as in the forward pass.
        codes: as in the forward pass.
        sign: as in the forward pass.
        out: the shape of `x`; its rows may lie apart. May be `grad`.
        wanted: what else.

    Returns:
        The sum for the scale, and what is wanted: (length of a row,) twice, and the shape of `x`.
    """
    library, layout = _library(), _layout(x, scale, before, wanted.after, codes, sign, wanted.after_shape)
    if library is None or layout is None or not _fits(grad, out) or (layout.by_column and wanted.dequantized):
        return None
    rows, length, stride, steps, by_column = layout
    grad_stride, out_stride = row_stride(grad, length), row_stride(out, length)
    if grad_stride is None or out_stride is None:
        return None
    threads = torch.get_num_threads()
    errors = torch.zeros(threads, length, **_FLOATS) if by_column else torch.empty(rows, **_FLOATS)
    asked = (wanted.sum_x, wanted.after_shape is not None)
    sum_x, sum_grad = (torch.zeros(threads, length, **_FLOATS) if is_asked else None for is_asked in asked)
    dequantized = torch.empty(x.shape, **_FLOATS) if wanted.dequantized else None
    library.lsq_backward(
        grad.data_ptr(), grad_stride, x.data_ptr(), stride, out.data_ptr(), out_stride, rows, length, scale.data_ptr(), steps, by_column,
        _pointer(before), *codes.ends, codes.half, _pointer(sign), errors.data_ptr(), _pointer(sum_x), _pointer(sum_grad),
        _pointer(wanted.after), _pointer(dequantized), threads,
    )  # fmt: skip
    total = errors.sum(0) if by_column else errors.view(-1, steps).sum(0)
    return total, None if sum_x is None else sum_x.sum(0), None if sum_grad is None else sum_grad.sum(0), dequantized


def statsq_forward(w: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    """`reference.statsq_forward` for a scale per row, None where it does not fit."""
    library = _library()
    if library is None or not w.numel() or not (_fits(w, scale) and _dense(w, scale)) or scale.shape != (w.shape[0], *[1] * (w.ndim - 1)):
        return None
    out = torch.empty_like(w)
    rows, threads = w.shape[0], torch.get_num_threads()
    library.statsq_forward(w.data_ptr(), out.data_ptr(), rows, w.numel() // rows, scale.data_ptr(), bits, TOP_CLIP, threads)
    return out


def probs_backward(
    grad: Tensor, probs: Tensor, scale: Tensor, codes: CodeRange, factor: float, out: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`reference.probs_backward` with the gradient of the scores written to `out`, which may be `grad`.

    Returns:
        The sum for the scale, and the quantized probabilities; None where it does not fit.
    """
    library, layout = _library(), _layout(probs, scale, None, None, codes, None)
    if library is None or layout is None or not (_fits(grad, out) and _dense(grad, probs, out)):
        return None
    rows, length, _, steps, by_column = layout
    if codes.half or by_column or length != probs.shape[-1]:
        return None
    errors, dequantized = torch.empty(rows, **_FLOATS), torch.empty(probs.shape, **_FLOATS)
    library.probs_backward(
        grad.data_ptr(), probs.data_ptr(), out.data_ptr(), rows, length, scale.data_ptr(), steps,
        codes.qmin, codes.qmax, factor, errors.data_ptr(), dequantized.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return errors.view(-1, steps).sum(0), dequantized
