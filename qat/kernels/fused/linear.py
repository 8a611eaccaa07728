"""LSQ and a Linear as one Function.

The only activation that is saved for backward is the Function's input, or the input of a LayerNorm
or GELU before the Function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.kernels import LSQParams, operators
from qat.kernels.fused.operand import (
    gradient_of,
    linear,
    load_saved,
    product_dtype,
    quantizer_gradient,
    save_for_backward,
    split_fields,
)
from qat.kernels.fused.source import FunctionInput, function_input, source_gradient
from qat.kernels.fused.weight import WeightParams
from qat.kernels.library import check_not_double_backward


class _Inputs(NamedTuple):
    """Inputs of `_LsqLinear`, or their gradients."""

    source: FunctionInput
    quantizer: LSQParams
    weight: Tensor
    weight_params: WeightParams
    bias: Tensor | None


def _flatten(inputs: _Inputs) -> tuple[Any, ...]:
    """Turn the inputs into the positional arguments that autograd sees."""
    return *inputs.source, *inputs.quantizer, *inputs.weight_params, inputs.weight, inputs.bias


def _unflatten(args: Any) -> _Inputs:
    """The inverse of `_flatten`."""
    source, quantizer, weight_params, rest = split_fields(
        args, FunctionInput, LSQParams, WeightParams
    )
    weight, bias = rest
    return _Inputs(source, quantizer, weight, weight_params, bias)


class _LsqLinear(torch.autograd.Function):
    """LSQ and a Linear; backward quantizes the input and, often outside CUDA, the weight again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = _unflatten(args)
        source = inputs.source
        dtype = product_dtype(source.origin)
        weight_q, weight_params = inputs.weight_params.quantize_and_save(inputs.weight, dtype)
        # Backward computes `result` again from `origin`.
        saved = inputs._replace(source=source._replace(result=None), weight_params=weight_params)
        save_for_backward(ctx, *_flatten(saved), dtype)

        x_q = operators.quantize(inputs.quantizer, source.value, dtype)
        out = linear(x_q.reshape(-1, x_q.shape[-1]), weight_q, inputs.bias)
        # A model may write into this output in place; autograd forbids this for a Function's view.
        return torch.ops.aten._unsafe_view(out, (*x_q.shape[:-1], len(inputs.weight)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_not_double_backward()
        *saved, dtype = load_saved(ctx)
        inputs = _unflatten(saved)
        source = inputs.source
        quantizer = inputs.quantizer
        has_offset_after = quantizer.after is not None

        grad = grad.reshape(-1, grad.shape[-1])
        weight_q = inputs.weight_params.forward(inputs.weight, dtype)
        grad_x_q = (grad @ weight_q).view(source.origin.shape)
        grad_sum = None
        if inputs.bias is not None or has_offset_after:
            grad_sum = grad.sum(0)
        grad_after = None
        if has_offset_after and grad_sum is not None:
            # The offset is a constant row that is added to the input, as the bias is to the output.
            grad_after = (grad_sum.unsqueeze(0) @ weight_q).squeeze(0)

        needs_grad = _unflatten(ctx.needs_input_grad)
        needs_x_q = needs_grad.weight or needs_grad.weight_params.scale
        grads = operators.gradients(
            quantizer,
            grad_x_q,
            source.origin,
            with_after=False,
            in_place=True,
            dequantized=dtype if needs_x_q else None,
            norm=(source.norm_weight, source.norm_bias),
            producer=source.producer,
        )
        grad_weight = None
        grad_weight_scale = None
        if grads.dequantized is not None:
            grad_weight_q = grad.t() @ grads.dequantized.reshape(-1, grads.dequantized.shape[-1])
            grad_weight, grad_weight_scale = inputs.weight_params.backward(
                grad_weight_q, inputs.weight
            )
        gradients = gradient_of(
            _Inputs,
            source=source_gradient(grads),
            quantizer=quantizer_gradient(grads._replace(after=grad_after)),
            weight=grad_weight,
            weight_params=gradient_of(WeightParams, scale=grad_weight_scale),
            bias=None if inputs.bias is None else grad_sum,
        )
        return _flatten(gradients)


def lsq_linear(
    x: Tensor, quantizer: LSQParams, weight: Tensor, params: WeightParams, bias: Tensor | None
) -> Tensor:
    """Compute q(x) @ q(W)^T + b, where q(...) quantizes.

    Args:
        x: (..., in), any float dtype.
        quantizer: quantizer of `x`.
        weight: (out, in), the float weight; if `params.settings` is None, the quantized weight.
        params: quantizer of `weight`.
        bias: (out,) or None.

    Returns:
        (..., out), in the dtype of `x`; under autocast, in the dtype of autocast.
    """
    inputs = _Inputs(function_input(x), quantizer, weight, params, bias)
    return _LsqLinear.apply(*_flatten(inputs))
