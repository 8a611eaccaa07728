"""The kernels on CUDA in one pass over memory each: Triton, outside of `torch.compile`. Nothing in them waits for the device.

What a function is given and what it gives is told in `reference`; None where the tensors do not fit.
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
from qat.kernels.tiles import dense, device_type, fit, rows_of, shapes_of, spaced, tiles_of

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
    scores = probs_backward(x, x, scale, codes, 0.3), reference.probs_backward(x, x, scale, codes, 0.3)
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


def lsq_forward(
    x: Tensor, scale: Tensor, before: Tensor | None, after: Tensor | None, codes: CodeRange, *, sign: Tensor | None = None
) -> Tensor | None:
    """`reference.lsq_forward`."""
    fits = fit(x, scale, before, after, sign) and dense(scale, before, after)
    layout = rows_of(x, scale, shapes_of(before, after), codes) if fits else None
    if layout is None:
        return None
    tiles, out = tiles_of(layout), _floats(x, *x.shape)
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
    dequantized: bool = False,
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
        after_shape: the shape of the offset behind, if its gradient is wanted.
        out: takes the gradient of `x`, float32; may be `grad`.
        dequantized: whether to give the result of `lsq_forward` as well.
        after: the offset behind; only for `dequantized`.
    """
    fits = fit(grad, x, scale, before, sign, out, after) and dense(scale, before, after)
    wanted = [None if before is None else before.shape, after_shape]
    layout = rows_of(x, scale, [*shapes_of(after), *(shape for shape in wanted if shape is not None)], codes) if fits else None
    out = _floats(x, *x.shape) if out is None else out
    out_stride = None if layout is None else row_stride(out, layout.length)
    if layout is None or out_stride is None or out.dtype != torch.float32:
        return None
    rows, length, stride, steps, by_column = layout
    tiles, (grad, grad_stride) = tiles_of(layout), spaced(grad, length)
    strip = tiles.block["BLOCK_R"] * max(tiles.down * tiles.across // PROGRAMS, 1)
    strips = -(-rows // strip)
    errors = _floats(x, strips, length) if by_column else _floats(x, rows // steps, steps, tiles.across)
    sums = [None if shape is None else _floats(x, strips, length) for shape in wanted]
    y = _floats(x, *x.shape) if dequantized else None
    _launch(
        _kernels().lsq_backward, (strips, tiles.across), grad, x, out, scale, before, after, sign, y, errors, *sums,
        *map(float, codes.ends), rows, length, grad_stride, stride, out_stride, steps, strip,
        HALF=codes.half, BY_COLUMN=by_column, **tiles.block,
    )  # fmt: skip
    of_scale = errors.sum(0) if by_column else errors.sum((0, 2))
    of_before, of_after = (None if s is None or shape is None else s.sum(0).view(shape) for s, shape in zip(sums, wanted, strict=True))
    return LsqGradients(out, of_scale, of_before, of_after, y)


def statsq_forward(w: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    """`reference.statsq_forward`, for a scale that varies along one dimension, not the last."""
    if w.ndim != scale.ndim or not (fit(w, scale) and dense(w, scale)):
        return None
    axis = max(range(w.ndim - 1), key=lambda i: scale.shape[i], default=0)
    layout = rows_of(w, scale, [], CodeRange(0, 0, axis)) if scale.shape[axis] == scale.numel() else None
    if layout is None or layout.by_column:
        return None
    tiles, out = tiles_of(layout), _floats(w, *w.shape)
    _launch(
        _kernels().statsq_forward, (tiles.down, tiles.across), w, out, scale, float(2 ** (bits - 1)),
        layout.rows, layout.length, layout.steps, **tiles.block,
    )  # fmt: skip
    return out


def probs_backward(
    grad: Tensor, probs: Tensor, scale: Tensor, codes: CodeRange, factor: float, *, out: Tensor | None = None, dequantized: bool = True
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`reference.probs_backward`, and the quantized probabilities if `dequantized`.

    Args:
        grad: gradient of the result of the forward pass.
        probs: the probabilities, not quantized.
        scale: as in the forward pass.
        codes: as in the forward pass.
        factor: what scores are multiplied by.
        out: takes the gradient of the scores, float32; may be `grad`.
        dequantized: see above.
    """
    layout = rows_of(probs, scale, [], codes) if fit(grad, probs, scale, out) and dense(scale) else None
    if layout is None or codes.half or layout.by_column or layout.length != probs.shape[-1] or layout.length > LONGEST:
        return None
    rows, length, stride, steps, _ = layout
    out = _floats(probs, *probs.shape) if out is None else out
    out_stride = row_stride(out, length)
    if out_stride is None or out.dtype != torch.float32:
        return None
    tiles, (grad, grad_stride), errors = tiles_of(layout, LONGEST), spaced(grad, length), _floats(probs, rows // steps, steps)
    y = _floats(probs, *probs.shape) if dequantized else None
    _launch(
        _kernels().probs_backward, (tiles.down,), grad, probs, out, scale, y, errors, float(codes.qmin), float(codes.qmax), float(factor),
        rows, length, grad_stride, stride, out_stride, steps, **tiles.block,
    )  # fmt: skip
    return out, errors.sum(0), y
