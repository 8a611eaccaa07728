"""LSQ, StatsQ and block floats as operators of torch, with kernels in C++ and Triton.

If no kernel supports the device or the tensors, operators call the reference
implementation. The fields of a quantizer are separate arguments of an operator: scale, offset
before, offset after, sign, and the four fields of `CodeRange`. Operators with an argument `out`
write to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import LsqGradients, gradient_scale
from qat.functional.lsq import step_and_slope as reference_step_and_slope
from qat.functional.statsq import statsq_scale
from qat.functional.ste import in_dtype
from qat.kernels import cpu, gpu, reference
from qat.kernels.library import operator
from qat.kernels.producer import Producer
from qat.kernels.rows import PLAIN_CLASSES, LSQParams, operator_args, split_operator_args

_LSQ = (
    "Tensor scale, Tensor? before, Tensor? after, Tensor? sign, "
    "int qmin, int qmax, int? axis, bool half"
)
# Reference functions of operators, for compilers that round like the operators: such compilers can
# fuse a decomposition with the operations around it.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def _kernels_for(x: Tensor) -> Any:
    """The module with kernels for the device of `x`.

    Returns None if no kernels are available, and for tensor classes that may have no memory.
    """
    if type(x) not in PLAIN_CLASSES:
        return None
    if x.is_cpu and cpu.available():
        return cpu
    if x.is_cuda and gpu.available():
        return gpu
    return None


def _with_kernels(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a reference function as an operator that uses a kernel of the same name, if any."""

    def register(reference_function: Callable[..., Any]) -> Callable[..., Any]:
        name = reference_function.__name__

        @functools.wraps(reference_function)
        def run(x: Tensor, *args: Any) -> Any:
            kernel = getattr(_kernels_for(x), name, None)
            if kernel is not None:
                result = kernel(x, *args)
                if result is not None:
                    return result
            return reference_function(x, *args)

        registered = operator(schema)(run)
        DECOMPOSITIONS[getattr(torch.ops.qat, name).default] = reference_function
        return registered

    return register


@_with_kernels(f"(Tensor x, {_LSQ}, ScalarType dtype) -> Tensor")
def lsq_forward(x: Tensor, *args: Any) -> Tensor:
    """`reference.lsq_forward`, rounded to the dtype in `args`."""
    q, dtype = split_operator_args(args)
    y = reference.lsq_forward(x, q.scale, q.before, q.after, q.codes, sign=q.sign)
    return in_dtype(y, dtype)


@_with_kernels("(Tensor w, Tensor scale, int bits, ScalarType dtype) -> Tensor")
def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`reference.statsq_forward`, rounded to `dtype`."""
    return in_dtype(reference.statsq_forward(w, scale, bits), dtype)


@_with_kernels("(Tensor w, int bits, ScalarType dtype) -> (Tensor, Tensor)")
def statsq(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`qat.functional.statsq`, rounded to `dtype`, and the scale."""
    scale = statsq_scale(w)
    return statsq_forward(w, scale, bits, dtype), scale


# Not to be decomposed: a compiler would add the terms of the scale in another order.
del DECOMPOSITIONS[torch.ops.qat.statsq.default]
step_and_slope = _with_kernels(
    "(Tensor start, Tensor growth, Tensor change, float min_reliable) -> (Tensor, Tensor)"
)(reference_step_and_slope)


def _concatenate(*sums: Tensor | None) -> Tensor:
    """Join the sums that are not None into one tensor (n,); `split_sums` is the inverse."""
    return torch.cat([t.flatten().float() for t in sums if t is not None])


def split_sums(sums: Tensor, *params: Tensor | None) -> list[Tensor | None]:
    """Take apart the sums that `lsq_backward` returns in one tensor.

    Args:
        sums: (n,), the concatenated sums.
        params: parameters, whose shapes and dtypes the results get; None for each parameter without
            a sum.
    """
    parts = iter(sums.split([t.numel() for t in params if t is not None]))
    gradients: list[Tensor | None] = []
    for t in params:
        gradients.append(None if t is None else next(parts).view(t.shape).to(t.dtype))
    return gradients


@operator(
    f"(Tensor grad, Tensor x, {_LSQ}, bool with_after, Tensor(a!) out, ScalarType? dequantized, "
    "Tensor? weight, Tensor? bias, str kind, float eps, float factor) -> (Tensor, Tensor, Tensor)"
)
def lsq_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.lsq_backward`, and the backward of the operation before the quantizer.

    The operation before the quantizer is `Producer(kind, eps, factor)`. The gradient of `x` is
    written to `out`.

    Returns:
        The gradient of the scale, without LSQ's factor. The requested gradients of the offsets and
        of a LayerNorm's weight and bias, joined into one tensor (see `split_sums`). The result of
        the forward pass; empty if not requested.
    """
    q, with_after, out, dequantized, weight, bias, *producer_args = split_operator_args(args)
    producer = Producer(*producer_args)
    kernels = _kernels_for(x)
    if kernels is not None:
        results = kernels.lsq_backward(
            grad, x, q, out, dequantized, weight, bias, producer, with_after=with_after
        )
        if results is not None:
            grad_scale, sums, y = results
            return _replace_none(grad_scale, sums, y, out)
    if producer.needs_recompute:
        quantizer_input, *saved = producer.forward(x, weight, bias)
        q_args = operator_args(q)
        no_producer = (None, None, *Producer())
        grad_scale, sums, y = lsq_backward(
            grad, quantizer_input, *q_args, with_after, out, dequantized, *no_producer
        )
        grad_x, *norm_grads = producer.backward(out, x, weight, bias, *saved)
        if grad_x is not out:
            out.copy_(grad_x)
        return grad_scale, _concatenate(sums, *norm_grads), y
    y = None if dequantized is None else lsq_forward(x, *operator_args(q), dequantized)
    grads = reference.lsq_backward(
        grad,
        x,
        q.scale,
        q.before,
        q.codes,
        sign=q.sign,
        after_shape=q.after.shape if with_after else None,
    )
    grad_x, *_ = producer.backward(grads.x, x, None, None)
    out.copy_(grad_x)
    sums = _concatenate(grads.scale.new_empty(0), grads.before, grads.after)
    return _replace_none(grads.scale, sums, y, out)


def _replace_none(
    grad_scale: Tensor, sums: Tensor, y: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of `lsq_backward`, with an empty tensor for None: operators cannot return None."""
    return grad_scale, sums, like.new_empty(0) if y is None else y


def _intermediate_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a quantized `x` before the cast: that of `x`, or `dtype` if `x` is float32."""
    return dtype if x.dtype == torch.float32 else x.dtype


def quantize(q: LSQParams, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Fake-quantize `x` for a product in `dtype`: round to the dtype of `x`, then to `dtype`."""
    return lsq_forward(x, *operator_args(q), _intermediate_dtype(x, dtype)).to(dtype)


def gradients(  # noqa: PLR0913  (one pass computes all that callers request)
    q: LSQParams,
    grad: Tensor,
    x: Tensor,
    *,
    out: Tensor | None = None,
    with_after: bool = True,
    in_place: bool = False,
    dequantized: torch.dtype | None = None,
    norm: tuple[Tensor | None, ...] = (None, None),
    producer: Producer = Producer(),  # noqa: B008  (a tuple)
    unpadded: Tensor | None = None,
) -> LsqGradients:
    """Gradients of `quantize` and of the operation before the quantizer.

    Args:
        q: the quantizer.
        grad: gradient of the quantized tensor.
        x: input of the operation before the quantizer.
        out: where the gradient of `x` is written; None = a new tensor in the dtype of `x`.
        with_after: True = compute the gradient of the offset after the quantizer.
        in_place: True = use `grad` as `out` if `grad` and `x` have the same dtype.
        dequantized: dtype of the result of `quantize` to return as well; None = do not return it.
        norm: weight and bias of a LayerNorm before the quantizer.
        producer: the operation before the quantizer.
        unpadded: the part of `x` without padding, whose number of elements enters LSQ's factor;
            None = all of `x`.
    """
    if in_place and grad.dtype == x.dtype:
        out = grad
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with_after = with_after and q.after is not None
    dtype = None if dequantized is None else _intermediate_dtype(x, dequantized)
    grad_scale, sums, y = lsq_backward(
        grad, x, *operator_args(q), with_after, out, dtype, *norm, *producer
    )
    unpadded = x if unpadded is None else unpadded
    grad_scale = grad_scale * gradient_scale(unpadded, q.codes, q.grad_factor, q.sign)
    after = q.after if with_after else None
    grad_before, grad_after, *norm_grads = split_sums(sums, q.before, after, *norm)
    y = None if dequantized is None else y.to(dequantized)
    return LsqGradients(out, grad_scale, grad_before, grad_after, y, *norm_grads)


@_with_kernels("(Tensor x, Tensor? tensor_scale, Tensor? grad, int bits) -> Tensor")
def round_blocks(x: Tensor, *args: Any) -> Tensor:
    """`reference.round_blocks`; the result is contiguous."""
    return reference.round_blocks(x, *args).contiguous()


# The decomposition makes no copy to contiguous memory: a compiler would need a second pass for it.
DECOMPOSITIONS[torch.ops.qat.round_blocks.default] = reference.round_blocks
