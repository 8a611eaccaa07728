"""The kernels on CUDA in one pass over memory each: Triton, outside of `torch.compile`. Nothing in them waits for the device.

What a function is given and what it gives is described in `reference`; None where the tensors do not fit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange, LsqGradients
from qat.kernels import reference
from qat.kernels.rows import row_stride
from qat.kernels.tiles import DTYPES, dense, device_type, fit, rows_of, shapes_of, spaced, tiles_of

log = logging.getLogger(__name__)

# A row of probabilities is held whole.
LONGEST = 4096
# Programs of a backward pass, each of which leaves rows of sums: several for every multiprocessor of a large device.
PROGRAMS = 1024
# Without fusion `r * s + c` rounds twice, as it does in two operations.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@functools.cache
def _kernels() -> Any:
    from qat.kernels import triton_kernels  # not every system has Triton

    return triton_kernels


@functools.cache
def available() -> bool:
    """True if Triton and a device are there and agree with `reference`. The first call compiles, and waits for the device."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        if device_type() == "cuda" and not torch.cuda.is_available():
            return False
        agrees, reason = _agrees(torch.device(device_type())), "its kernels give other numbers here"
    except Exception as error:  # driver, compiler, linker: whatever it is, everything works without
        agrees, reason = False, f"{type(error).__name__}: {error}".partition("\n")[0]
    if not agrees:
        log.info("quantizers take several passes over memory: no Triton (%s)", reason)
    return agrees


@torch.no_grad()
def _agrees(device: torch.device) -> bool:
    """For values in and out of range and halfway between codes: bit for bit, but for sums."""
    x = torch.linspace(-9, 9, 4 * 37 * 3, device=device, dtype=torch.float32).reshape(3, 4, 37)
    scale, offset, codes = x.new_tensor([0.5, 1.0, 0.3, 2.0]), x.flatten()[:37].clone(), CodeRange(-4, 3, 1)
    dequantized = lsq_forward(x, scale, offset, offset, codes), reference.lsq_forward(x, scale, offset, offset, codes)
    weights = statsq_forward(x[0], scale[:, None], 2), reference.statsq_forward(x[0], scale[:, None], 2)
    steps = lsq_backward(x, x, scale, offset, codes), reference.lsq_backward(x, x, scale, offset, codes)
    scores = probs_backward(x, x, scale, codes, 0.3, torch.empty_like(x)), reference.probs_backward(x, x, scale, codes, 0.3)
    return all(ours is not None and torch.equal(ours, expected) for ours, expected in (dequantized, weights)) and all(
        ours is not None and all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(ours[:2], expected[:2], strict=True))
        for ours, expected in (steps, scores)
    )


def _launch(kernel: Any, programs: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel where its first argument is."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[programs](*args, **constants, **OPTIONS)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def lsq_forward(  # noqa: PLR0913  (a quantizer, and what is wanted of it)
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    codes: CodeRange,
    *,
    sign: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """`reference.lsq_forward`, rounded to `dtype` as it is written."""
    fits = fit(x, scale, before, after, sign) and dense(scale, before, after)
    layout = rows_of(x, scale, shapes_of(before, after), codes) if fits and dtype in DTYPES else None
    if layout is None:
        return None
    tiles, out = tiles_of(layout), torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(
        _kernels().lsq_forward, (tiles.down, tiles.across), x, out, scale, before, after, sign, *map(float, codes.ends),
        layout.rows, layout.length, layout.stride, layout.steps, HALF=codes.half, BY_COLUMN=layout.by_column, **tiles.block,
    )  # fmt: skip
    return out


def lsq_backward(  # noqa: PLR0913  (one pass gives all that may be wanted)
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    codes: CodeRange,
    *,
    sign: Tensor | None = None,
    after_shape: torch.Size | None = None,
    out: Tensor | None = None,
    dequantized: torch.dtype | None = None,
    after: Tensor | None = None,
) -> LsqGradients | None:
    """`reference.lsq_backward` and more in one pass.

    Args:
        grad: gradient of the result of the forward pass.
        x: as in the forward pass.
        scale: as in the forward pass.
        before: as in the forward pass.
        codes: as in the forward pass.
        sign: as in the forward pass.
        after_shape: the shape of the offset after it, if its gradient is wanted.
        out: takes the gradient of `x`, which is rounded to its dtype; may be `grad`. None = new, in the dtype of `x`.
        dequantized: the dtype in which to give the result of `lsq_forward` as well; None = not.
        after: the offset after it; only for `dequantized`.
    """
    fits = fit(grad, x, scale, before, sign, out, after) and dense(scale, before, after) and dequantized in {None, *DTYPES}
    wanted = [None if before is None else before.shape, after_shape]
    layout = rows_of(x, scale, [*shapes_of(after), *(shape for shape in wanted if shape is not None)], codes) if fits else None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    out_stride = None if layout is None else row_stride(out, layout.length)
    if layout is None or out_stride is None:
        return None
    rows, length, stride, steps, by_column = layout
    tiles, (grad, grad_stride) = tiles_of(layout), spaced(grad, length)
    strip = tiles.block["BLOCK_R"] * max(tiles.down * tiles.across // PROGRAMS, 1)
    strips = -(-rows // strip)
    errors = _floats(x, strips, length) if by_column else _floats(x, rows // steps, steps, tiles.across)
    sums = [None if shape is None else _floats(x, strips, length) for shape in wanted]
    y = None if dequantized is None else torch.empty(x.shape, dtype=dequantized, device=x.device)
    _launch(
        _kernels().lsq_backward, (strips, tiles.across), grad, x, out, scale, before, after, sign, y, errors, *sums,
        *map(float, codes.ends), rows, length, grad_stride, stride, out_stride, steps, strip,
        HALF=codes.half, BY_COLUMN=by_column, **tiles.block,
    )  # fmt: skip
    of_scale = errors.sum(0) if by_column else errors.sum((0, 2))
    of_before, of_after = (None if s is None or shape is None else s.sum(0).view(shape) for s, shape in zip(sums, wanted, strict=True))
    return LsqGradients(out, of_scale, of_before, of_after, y)


def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """`reference.statsq_forward`, for a scale that varies along one dimension, not the last; rounded to `dtype` as it is written."""
    if w.ndim != scale.ndim or dtype not in DTYPES or not (fit(w, scale) and dense(w, scale)):
        return None
    axis = max(range(w.ndim - 1), key=lambda i: scale.shape[i], default=0)
    layout = rows_of(w, scale, [], CodeRange(0, 0, axis)) if scale.shape[axis] == scale.numel() else None
    if layout is None or layout.by_column:
        return None
    tiles, out = tiles_of(layout), torch.empty(w.shape, dtype=dtype, device=w.device)
    _launch(
        _kernels().statsq_forward, (tiles.down, tiles.across), w, out, scale, float(2 ** (bits - 1)),
        layout.rows, layout.length, layout.steps, **tiles.block,
    )  # fmt: skip
    return out


def probs_backward(
    grad: Tensor, probs: Tensor, scale: Tensor, codes: CodeRange, factor: float, out: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`reference.probs_backward`, and the quantized probabilities.

    Args:
        grad: gradient of the result of the forward pass.
        probs: the probabilities, not quantized.
        scale: as in the forward pass.
        codes: as in the forward pass.
        factor: what scores are multiplied by.
        out: takes the gradient of the scores, which is rounded to its dtype; may be `grad`.
        dtype: of the quantized probabilities.
    """
    layout = rows_of(probs, scale, [], codes) if fit(grad, probs, scale, out) and dense(scale) and dtype in DTYPES else None
    if layout is None or codes.half or layout.by_column or layout.length != probs.shape[-1] or layout.length > LONGEST:
        return None
    rows, length, stride, steps, _ = layout
    out_stride = row_stride(out, length)
    if out_stride is None:
        return None
    tiles, (grad, grad_stride), errors = tiles_of(layout, LONGEST), spaced(grad, length), _floats(probs, rows // steps, steps)
    y = torch.empty(probs.shape, dtype=dtype, device=probs.device)
    _launch(
        _kernels().probs_backward, (tiles.down,), grad, probs, out, scale, y, errors, float(codes.qmin), float(codes.qmax), float(factor),
        rows, length, grad_stride, stride, out_stride, steps, **tiles.block,
    )  # fmt: skip
    return out, errors.sum(0), y
