"""LSQ and a Linear as one Function that keeps the input alone, or what the input was made of: a LayerNorm's or a GELU's own input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.fused import simple
from qat.kernels.fused.operand import LSQParams, product_dtype
from qat.kernels.fused.source import keep, recompute
from qat.kernels.fused.weight import WeightParams


class _LsqLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        scale, before, after, weight, step, bias, settings, w_settings, ready = args
        dtype, kept = product_dtype(x), keep(x)
        ctx.make, ctx.settings, ctx.w_settings, ctx.dtype = kept.make, settings, w_settings, dtype
        params = WeightParams(w_settings, step, ready).fitted(weight)
        ctx.save_for_backward(scale, before, after, weight, params.scale, bias, ready, *kept.tensors)
        xq = LSQParams(scale, before, after, *settings).forward(x, dtype)
        return F.linear(xq, params.forward(weight, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, before, after, weight, step, bias, ready, *saved = ctx.saved_tensors
        x = recompute(ctx.make, tuple(saved))
        operand, params = LSQParams(scale, before, after, *ctx.settings), WeightParams(ctx.w_settings, step, ready)
        if torch.is_grad_enabled():
            with simple.autocast_of(x, ctx.dtype, enabled=ctx.dtype != weight.dtype):
                out = simple.lsq_linear(x, operand, weight, params, bias)
            return *simple.gradients(out, [x, *operand.tensors, weight, step, bias], ctx.needs_input_grad, grad), None, None, None
        grad = grad.reshape(-1, grad.shape[-1])
        of_bias = grad.sum(0) if bias is not None or after is not None else None
        wq = params.forward(weight, ctx.dtype)
        of_xq = (grad @ wq).view(x.shape)
        # The offset after it is a constant row of the input: its gradient goes through the product as the bias's does.
        of_after = None if after is None or of_bias is None else (of_bias.unsqueeze(0) @ wq).squeeze(0).float()
        learns = any(ctx.needs_input_grad[4:6])
        found = operand.backward(of_xq, x, with_after=False, in_place=True, dequantized=ctx.dtype if learns else None)
        xq = found.dequantized
        of_weight, of_step = (None, None) if xq is None else params.backward(grad.t() @ xq.flatten(0, -2), weight)
        shown = None if bias is None or of_bias is None else of_bias.to(bias.dtype)
        return found.x, found.scale, found.before, of_after, of_weight, of_step, shown, None, None, None


def lsq_linear(x: Tensor, operand: LSQParams, weight: Tensor, params: WeightParams, bias: Tensor | None) -> Tensor:
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
    return _LsqLinear.apply(x, *operand.tensors, weight, params.scale, bias, operand.settings, params.settings, params.ready)
