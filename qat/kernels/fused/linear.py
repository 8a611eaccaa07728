"""LSQ and a Linear as one Function that keeps the input alone, or what the input was made of: a LayerNorm's or a GELU's own input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.kernels import LSQParams, operators
from qat.kernels.fused.operand import keep, kept, linear, product_dtype
from qat.kernels.fused.source import given
from qat.kernels.fused.weight import WeightParams
from qat.kernels.library import differentiated_once


class _LsqLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        (made_x, x, *norm, made), q, (weight, *settings, bias) = (
            args[:5],
            LSQParams(*args[5:11]),
            args[11:],
        )
        dtype = product_dtype(x)
        wq, params = WeightParams(*settings).begin(weight, dtype)
        keep(ctx, x, *norm, made, *q, weight, *params, bias, dtype)
        xq = operators.quantize(q, x if made_x is None else made_x, dtype)
        out = linear(xq.reshape(-1, xq.shape[-1]), wq, bias)
        # A net may write into what a Linear gave; autograd forbids that for a view.
        return torch.ops.aten._unsafe_view(out, (*xq.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once()
        x, weight_, bias_, made, *rest = kept(ctx)
        q, (weight, *settings, bias, dtype) = LSQParams(*rest[:6]), rest[6:]
        params, grad = WeightParams(*settings), grad.reshape(-1, grad.shape[-1])
        of_bias = grad.sum(0) if bias is not None or q.after is not None else None
        wq = params.forward(weight, dtype)
        of_xq = (grad @ wq).view(x.shape)
        # The offset after it is a constant row of the input: its gradient goes through the product as the bias's does.
        of_after = (
            None if q.after is None or of_bias is None else (of_bias.unsqueeze(0) @ wq).squeeze(0)
        )
        wanted = dtype if ctx.needs_input_grad[11] or ctx.needs_input_grad[13] else None
        found = operators.gradients(
            q,
            of_xq,
            x,
            with_after=False,
            in_place=True,
            dequantized=wanted,
            norm=(weight_, bias_),
            made=made,
        )
        xq = found.dequantized
        of_weight, of_step = (
            (None, None) if xq is None else params.backward(grad.t() @ xq.flatten(0, -2), weight)
        )
        of_x = None, found.x, found.norm_weight, found.norm_bias, None
        of_bias = None if bias is None else of_bias
        return (
            *of_x,
            found.scale,
            found.before,
            of_after,
            None,
            None,
            None,
            of_weight,
            None,
            of_step,
            None,
            of_bias,
        )


def lsq_linear(
    x: Tensor, operand: LSQParams, weight: Tensor, params: WeightParams, bias: Tensor | None
) -> Tensor:
    """q(x) @ q(W)^T + b.

    Args:
        x: (..., in), any float dtype.
        operand: its quantizer.
        weight: (out, in), the float master, or the quantized weight where `params` has no settings.
        params: its quantizer.
        bias: (out,) or None.

    Returns:
        (..., out), in the dtype of `x`, or autocast's.
    """
    return _LsqLinear.apply(*given(x), *operand, weight, *params, bias)
