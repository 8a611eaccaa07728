"""The kernels as operators, each with a form for a device: C++ on a CPU, Triton on CUDA, the formula elsewhere.

`out` is written to. Arguments of a quantizer are, one after the other: scale, offset before, offset after, sign, the four of `CodeRange`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import LsqGradients, gradient_scale
from qat.functional.lsq import step_and_slope as formula_of_steps
from qat.functional.statsq import statsq_scale
from qat.functional.ste import in_dtype
from qat.kernels import cpu, gpu, reference
from qat.kernels.library import operator
from qat.kernels.made import Made
from qat.kernels.rows import PLAIN, LSQParams, params_of

_LSQ = "Tensor scale, Tensor? before, Tensor? after, Tensor? sign, int qmin, int qmax, int? axis, bool half"
# Of the forward passes, for a compiler that rounds as they do: no pass over memory of their own.
FORMULAS: dict[Any, Callable[..., Any]] = {}


def _on(x: Tensor) -> Any:
    """The module of kernels for the device; None, which leaves the formula, also for a tensor without memory."""
    found = None if type(x) not in PLAIN else cpu if x.is_cpu else gpu if x.is_cuda else None
    return found if found is not None and found.available() else None


def _with_forms(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a formula as the operator of its name, for which modules of kernels may have forms."""

    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        name = formula.__name__

        @functools.wraps(formula)
        def run(x: Tensor, *args: Any) -> Any:
            form = getattr(_on(x), name, None)
            found = None if form is None else form(x, *args)
            return formula(x, *args) if found is None else found

        made = operator(schema)(run)
        FORMULAS[getattr(torch.ops.qat, name).default] = formula
        return made

    return register


@_with_forms(f"(Tensor x, {_LSQ}, ScalarType dtype) -> Tensor")
def lsq_forward(x: Tensor, *args: Any) -> Tensor:
    """`reference.lsq_forward`, rounded to a dtype."""
    q, dtype = params_of(args)
    return in_dtype(
        reference.lsq_forward(x, q.scale, q.before, q.after, q.codes, sign=q.sign), dtype
    )


@_with_forms("(Tensor w, Tensor scale, int bits, ScalarType dtype) -> Tensor")
def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`reference.statsq_forward`, rounded to a dtype."""
    return in_dtype(reference.statsq_forward(w, scale, bits), dtype)


@_with_forms("(Tensor w, int bits, ScalarType dtype) -> (Tensor, Tensor)")
def statsq(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`qat.functional.statsq`, rounded to a dtype, and its scale."""
    scale = statsq_scale(w)
    return statsq_forward(w, scale, bits, dtype), scale


del FORMULAS[torch.ops.qat.statsq.default]  # a compiler would add up the scale in another order
step_and_slope = _with_forms(
    "(Tensor start, Tensor growth, Tensor change, float unit) -> (Tensor, Tensor)"
)(formula_of_steps)


def _joined(*sums: Tensor | None) -> Tensor:
    return torch.cat([t.flatten().float() for t in sums if t is not None])


@operator(
    f"(Tensor grad, Tensor x, {_LSQ}, bool with_after, Tensor(a!) out, ScalarType? dequantized, Tensor? weight, Tensor? bias, "
    "str kind, float number) -> (Tensor, Tensor, Tensor)"
)
def lsq_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.lsq_backward` of what `x` was made into: the gradient of `x` goes to `out`.

    Given are the gradient of the scale; those of both offsets and of a LayerNorm's weight and bias, as far as they are wanted, one after
    the other in one tensor; and what the forward pass gave.
    """
    (q, with_after, out, dequantized, *norm), made, kernels = (
        params_of(args[:13]),
        Made(*args[13:]),
        _on(x),
    )
    found: Any = (
        None
        if kernels is None
        else kernels.lsq_backward(grad, x, q, out, dequantized, *norm, made, with_after=with_after)
    )
    if found is None and made.is_other:
        quantized, *kept = made.forward(x, *norm)
        scale, sums, y = lsq_backward(grad, quantized, *args[:11], None, None, *Made())
        of_x, *of_norm = made.backward(out, x, *norm, *kept)
        if of_x is not out:
            out.copy_(of_x)
        found = scale, _joined(sums, *of_norm), y
    elif found is None:
        y = None if dequantized is None else lsq_forward(x, *args[:8], dequantized)
        shape = q.after.shape if with_after else None
        of_x, scale, *offsets = reference.lsq_backward(
            grad, x, q.scale, q.before, q.codes, sign=q.sign, after_shape=shape
        )[:4]
        out.copy_(made.backward(of_x, x, None, None)[0])
        found = scale, _joined(scale.new_empty(0), *offsets), y
    return tuple(out.new_empty(0) if t is None else t for t in found)


def _through(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a quantized `x` is rounded to on its way to `dtype`: the dtype of `x`, unless that is float32, which rounds nothing."""
    return dtype if x.dtype == torch.float32 else x.dtype


def quantize(q: LSQParams, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Fake-quantize `x` as the factor of a product in `dtype`: rounded to the dtype of `x`, then to that."""
    return lsq_forward(x, *q[:4], *q.codes, _through(x, dtype)).to(dtype)


def gradients(  # noqa: PLR0913  (what else comes out of the one pass over memory is up to the caller)
    q: LSQParams,
    grad: Tensor,
    x: Tensor,
    *,
    out: Tensor | None = None,
    with_after: bool = True,
    in_place: bool = False,
    dequantized: torch.dtype | None = None,
    norm: tuple[Tensor | None, ...] = (None, None),
    made: Made = Made(),  # noqa: B008  (a tuple)
    counted: Tensor | None = None,
) -> LsqGradients:
    """Gradients of `quantize`, or of what was made before it; that of the scale complete.

    Args:
        q: the quantizer.
        grad: of its result.
        x: what its input was made of.
        out: takes the gradient of `x`. None = new, in the dtype of `x`.
        with_after: whether to sum up that of an offset after it; else it is None.
        in_place: whether `grad` may take the gradient of `x`, which it does if it has its dtype.
        dequantized: the dtype in which to give the result of `quantize` as well; None = not.
        norm: weight and bias of a LayerNorm that was `made` of `x`.
        made: how the input was made of `x`, whose gradient is given.
        counted: `x` without padding, which LSQ's factor does not count; None = all of it.
    """
    out = grad if in_place and grad.dtype == x.dtype else out
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    with_after = with_after and q.after is not None
    levels = None if dequantized is None else _through(x, dequantized)
    of_scale, sums, y = lsq_backward(
        grad, x, *q[:4], *q.codes, with_after, out, levels, *norm, *made
    )
    of_scale = of_scale * gradient_scale(
        x if counted is None else counted, q.codes, q.grad_factor, q.sign
    )
    before, after, *of_norm = split(sums, q.before, q.after if with_after else None, *norm)
    return LsqGradients(
        out, of_scale, before, after, None if dequantized is None else y.to(dequantized), *of_norm
    )


def split(sums: Tensor, *like: Tensor | None) -> list[Tensor | None]:
    """Gradients that `lsq_backward` gives in one tensor, as those they are of."""
    parts = iter(sums.split([t.numel() for t in like if t is not None]))
    return [None if t is None else next(parts).view(t.shape).to(t.dtype) for t in like]


@_with_forms("(Tensor x, Tensor? t, Tensor? grad, int bits) -> Tensor")
def round_blocks(x: Tensor, *args: Any) -> Tensor:
    """`reference.round_blocks`, in one piece."""
    return reference.round_blocks(x, *args).contiguous()


FORMULAS[torch.ops.qat.round_blocks.default] = (
    reference.round_blocks
)  # a compiler would need a second pass for the piece
