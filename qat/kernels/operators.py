"""The kernels as operators, each with a form for a device: C++ on a CPU, Triton on CUDA, the formula elsewhere.

`out` is written to. Arguments of a quantizer are, one after the other: scale, offset before, offset after, sign, the four of `CodeRange`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange, LsqGradients
from qat.functional.lsq import step_and_slope as formula_of_steps
from qat.functional.ste import in_dtype
from qat.kernels import cpu, gpu, reference
from qat.kernels.blocks import round_blocks_formula
from qat.kernels.library import operator
from qat.kernels.made import Made
from qat.kernels.rows import PLAIN, Steps

_CODES = "int qmin, int qmax, int? axis, bool half"
_LSQ = f"Tensor scale, Tensor? before, Tensor? after, Tensor? sign, {_CODES}"


def _on(x: Tensor) -> Any:
    """The module of kernels for the device; None, which leaves the formula, also for a tensor without memory."""
    if type(x) not in PLAIN:
        return None
    return cpu if x.is_cpu else gpu if x.is_cuda and gpu.available() else None


def _steps(scale: Tensor, before: Any, after: Any, sign: Any, *codes: Any) -> Steps:
    return Steps(scale, before, after, sign, CodeRange(*codes))


def _lsq_formula(x: Tensor, *args: Any) -> Tensor:
    scale, before, after, sign, codes = _steps(*args[:8])
    return in_dtype(reference.lsq_forward(x, scale, before, after, codes, sign=sign), args[8])


@operator(f"(Tensor x, {_LSQ}, ScalarType dtype) -> Tensor")
def lsq_forward(x: Tensor, *args: Any) -> Tensor:
    """`reference.lsq_forward`, rounded to a dtype."""
    kernels = _on(x)
    made = None if kernels is None else kernels.lsq_forward(x, _steps(*args[:8]), args[8])
    return _lsq_formula(x, *args) if made is None else made


@operator(
    f"(Tensor grad, Tensor x, {_LSQ}, int[]? after_shape, Tensor(a!) out, ScalarType? dequantized, Tensor? weight, Tensor? bias, "
    "str kind, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def lsq_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """`reference.lsq_backward` of what `x` was made into: the gradient of `x` goes to `out`, the others are given, those that are wanted.

    These are of the scale, of both offsets, then what the forward pass gave, then gradients of a LayerNorm's weight and bias.
    """
    q, (after_shape, out, dequantized, *norm), made, kernels = _steps(*args[:8]), args[8:13], Made(*args[13:]), _on(x)
    shape = None if after_shape is None else torch.Size(after_shape)
    found: tuple[Tensor | None, ...] | None = None
    if kernels is gpu:
        found = gpu.lsq_backward(grad, x, q, shape, out, dequantized, (norm[0], norm[1]), made)
    elif kernels is cpu and not made.kind:
        found = cpu.lsq_backward(grad, x, q, shape, out, dequantized)
    if found is None and made.kind:
        quantized, *kept = made.forward(x, *norm)
        plain = lsq_backward(grad, quantized, *args[:11], None, None, *Made())
        of_x, *of_norm = made.backward(out, x, *norm, *kept)
        if of_x is not out:
            out.copy_(of_x)
        found = *plain[:4], *of_norm
    elif found is None:
        y = None if dequantized is None else _lsq_formula(x, *args[:8], dequantized)
        of_x, *sums = reference.lsq_backward(grad, x, q.scale, q.before, q.codes, sign=q.sign, after_shape=shape)[:4]
        out.copy_(of_x)
        found = *sums, y
    return tuple(out.new_empty(0) if t is None else t for t in (*found, None, None)[:6])


def lsq_gradients(  # noqa: PLR0913  (what else comes out of the one pass over memory is up to the caller)
    grad: Tensor,
    x: Tensor,
    q: Steps,
    *,
    after_shape: torch.Size | None = None,
    out: Tensor | None = None,
    dequantized: torch.dtype | None = None,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    made: Made = Made(),  # noqa: B008  (a tuple)
) -> LsqGradients:
    """Gradients of `lsq_forward`, or of what was made before it.

    Args:
        grad: gradient of its result.
        x: what its input was made of.
        q: the quantizer.
        after_shape: the shape of the offset after it, if its gradient is wanted.
        out: takes the gradient of `x`; may be `grad`. None = new, in the dtype of `x`.
        dequantized: the dtype in which to give the result of `lsq_forward` as well; None = not.
        norm: weight and bias of a LayerNorm that was `made` of `x`.
        made: how the input of the forward pass was made of `x`, whose gradient is given.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    found = lsq_backward(grad, x, *q[:4], *q.codes, after_shape, out, dequantized, *norm, *made)
    wanted = (q.scale, q.before, after_shape, dequantized, *norm)
    return LsqGradients(out, found[0], *(None if asked is None else t for asked, t in zip(wanted[1:], found[1:], strict=True)))


def _statsq_formula(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return in_dtype(reference.statsq_forward(w, scale, bits), dtype)


@operator("(Tensor w, Tensor scale, int bits, ScalarType dtype) -> Tensor")
def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`reference.statsq_forward`, rounded to a dtype."""
    kernels = _on(w)
    made = None if kernels is None else kernels.statsq_forward(w, scale, bits, dtype)
    return _statsq_formula(w, scale, bits, dtype) if made is None else made


@operator(f"(Tensor grad, Tensor probs, Tensor scale, {_CODES}, float factor, Tensor(a!) out, ScalarType dtype) -> (Tensor, Tensor)")
def probs_backward(grad: Tensor, probs: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`reference.probs_backward`: the gradient of the scores goes to `out`; gives the sum for the scale, and quantized probabilities."""
    kernels, codes, (factor, out, dtype) = _on(probs), CodeRange(*rest[:4]), rest[4:]
    found = None if kernels is None else kernels.probs_backward(grad, probs, scale, codes, factor, out, dtype)
    if found is None:
        of_scores, of_scale = reference.probs_backward(grad, probs, scale, codes, factor)
        found = of_scale, _lsq_formula(probs, scale, None, None, None, *codes, dtype)
        out.copy_(of_scores)
    return found


@operator("(Tensor start, Tensor grown, Tensor change, float unit) -> (Tensor, Tensor)")
def step_and_slope(start: Tensor, grown: Tensor, change: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """`qat.functional.lsq.step_and_slope`."""
    found = gpu.step_and_slope(start, grown, change, unit) if _on(start) is gpu else None
    return formula_of_steps(start, grown, change, unit) if found is None else found


# Of the forward passes, for a compiler that rounds as they do: no pass over memory of their own.
FORMULAS: dict[Any, Callable[..., Any]] = {
    torch.ops.qat.lsq_forward.default: _lsq_formula,
    torch.ops.qat.statsq_forward.default: _statsq_formula,
    torch.ops.qat.step_and_slope.default: formula_of_steps,
    torch.ops.qat.round_blocks.default: round_blocks_formula,
}
