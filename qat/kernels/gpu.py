"""The kernels on CUDA in one pass over memory each: Triton. Nothing in them waits for the device.

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

from qat.functional.lsq import CodeRange
from qat.kernels import reference
from qat.kernels.made import Made
from qat.kernels.rows import Layout, Steps, row_stride, rows_of
from qat.kernels.tiles import DTYPES, TILE, WIDEST, dense, device_type, fit, spaced, tiles_of

log = logging.getLogger(__name__)

# A row of probabilities is held whole.
LONGEST = 4096
# Programs of a backward pass, each of which leaves rows of sums to be added: two for every multiprocessor of a large device.
PROGRAMS = 264
# What the backward pass goes through to what its input was made of.
GONE_THROUGH = ("", "norm", "none")
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
    of_x = torch.empty_like(x)
    sums = lsq_backward(x, x, Steps(scale, offset, offset, None, codes), None, of_x, torch.float32)
    expected = reference.lsq_backward(x, x, scale, offset, codes)
    if sums is None or sums[0] is None or sums[3] is None:
        return False
    is_near = torch.allclose(sums[0], expected.scale, rtol=1e-4, atol=1e-3)
    return is_near and torch.equal(of_x, expected.x) and torch.equal(sums[3], reference.lsq_forward(x, scale, offset, offset, codes))


def _launch(kernel: Any, programs: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel where its first argument is."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[programs](*args, **{**OPTIONS, **constants})


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def lsq_forward(x: Tensor, q: Steps, dtype: torch.dtype) -> Tensor | None:
    """`reference.lsq_forward`, rounded to `dtype` as it is written."""
    fits = fit(x, *q[:4]) and dense(*q[:3])
    layout = rows_of(x, q) if fits and dtype in DTYPES else None
    if layout is None:
        return None
    tiles, out = tiles_of(layout), torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(
        _kernels().lsq_forward, (tiles.down, tiles.across), x, out, *q[:4], *map(float, q.codes.ends),
        layout.rows, layout.length, layout.stride, layout.steps, HALF=q.codes.half, BY_COLUMN=layout.by_column, **tiles.block,
    )  # fmt: skip
    return out


def lsq_backward(  # noqa: PLR0913, PLR0917  (one pass gives all that may be wanted)
    grad: Tensor,
    x: Tensor,
    q: Steps,
    after_shape: torch.Size | None,
    out: Tensor,
    dequantized: torch.dtype | None,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    made: Made = Made(),  # noqa: B008  (a tuple)
) -> tuple[Tensor | None, ...] | None:
    """`reference.lsq_backward` of what `x` was made into, and more, in one pass.

    Args:
        grad: gradient of the result of the forward pass.
        x: what its input was made of.
        q: the quantizer.
        after_shape: the shape of the offset after it, if its gradient is wanted.
        out: takes the gradient of `x`, which is rounded to its dtype; may be `grad`.
        dequantized: the dtype in which to give the result of the forward pass as well; None = not.
        norm: weight and bias of a LayerNorm.
        made: how the input was made.

    Returns:
        Gradients of scale and offsets, the result of the forward pass, gradients of weight and bias; None for what is not wanted.
    """
    fits = made.kind in GONE_THROUGH and fit(grad, x, *q[:4], out, *norm) and dense(*q[:3], *norm) and dequantized in {None, *DTYPES}
    layout = rows_of(x, q, after_shape, *(None if t is None else t.shape for t in norm)) if fits else None
    out_stride = None if layout is None else row_stride(out, layout.length)
    is_normed = made.kind == "norm"
    if layout is None or out_stride is None or (is_normed and not layout.length == x.shape[-1] <= LONGEST):
        return None
    rows, length, stride, steps, by_column = layout
    tiles, (grad, grad_stride) = tiles_of(layout, LONGEST if is_normed else WIDEST), spaced(grad, length)
    strip = tiles.block["BLOCK_R"] * max(tiles.down * tiles.across // PROGRAMS, 1)
    strips = -(-rows // strip)
    errors = _floats(x, strips, length) if by_column else _floats(x, rows // steps, steps, tiles.across)
    wanted = (q.before if norm[1] is None else norm[1], after_shape, norm[0])
    sums = [None if asked is None else _floats(x, strips, length) for asked in wanted]
    y = None if dequantized is None else torch.empty(x.shape, dtype=dequantized, device=x.device)
    _launch(
        _kernels().lsq_backward, (strips, tiles.across), grad, x, out, *q[:4], y, errors, *sums, *norm, *map(float, q.codes.ends),
        rows, length, grad_stride, stride, out_stride, steps, strip, made.eps,
        MADE=made.kind, HALF=q.codes.half, BY_COLUMN=by_column, **tiles.block,
    )  # fmt: skip
    of_x, of_after, of_weight = (None if s is None else s.sum(0) for s in sums)
    # No operator gives one tensor twice.
    of_bias = None if norm[1] is None or of_x is None else of_x.to(norm[1].dtype, copy=q.before is not None)
    return (
        errors.sum(0) if by_column else errors.sum((0, 2)),
        None if q.before is None or of_x is None else of_x.view(q.before.shape),
        None if after_shape is None or of_after is None else of_after.view(after_shape),
        y,
        None if norm[0] is None or of_weight is None else of_weight.to(norm[0].dtype),
        of_bias,
    )


def step_and_slope(start: Tensor, grown: Tensor, change: Tensor, unit: float) -> tuple[Tensor, Tensor] | None:
    """`qat.functional.lsq.step_and_slope`, in one launch, where its operations are eight."""
    if not (fit(start, grown, change) and dense(start, grown, change) and start.dtype == torch.float32):
        return None
    step, slope = torch.empty_like(start), torch.empty_like(start)
    _launch(_kernels().step_and_slope, (-(-start.numel() // TILE),), step, slope, start, grown, change, start.numel(), unit, BLOCK=TILE)
    return step, slope


def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """`reference.statsq_forward` for a scale per row, rounded to `dtype` as it is written."""
    is_known = scale.shape == (w.shape[0], *[1] * (w.ndim - 1)) and w.numel() and dtype in DTYPES and fit(w, scale) and dense(w, scale)
    if not is_known:
        return None
    rows, length = w.shape[0], w.numel() // w.shape[0]
    tiles, out = tiles_of(Layout(rows, length, length, rows, by_column=False)), torch.empty(w.shape, dtype=dtype, device=w.device)
    _launch(_kernels().statsq_forward, (tiles.down, tiles.across), w, out, scale, float(2 ** (bits - 1)), rows, length, **tiles.block)
    return out


def probs_backward(
    grad: Tensor, probs: Tensor, scale: Tensor, codes: CodeRange, factor: float, out: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor] | None:
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
    layout = (
        rows_of(probs, Steps(scale, None, None, None, codes)) if fit(grad, probs, scale, out) and dense(scale) and dtype in DTYPES else None
    )
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
    return errors.sum(0), y
