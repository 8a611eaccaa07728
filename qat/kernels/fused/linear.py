"""LSQ and a Linear as one Function that keeps the input alone, or what the input was made of: a LayerNorm's or a GELU's own input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat import kernels
from qat.functional.statsq import statsq_scale
from qat.kernels.fused import simple
from qat.kernels.fused.operand import LSQParams, product_dtype
from qat.kernels.fused.source import keep, recompute


class Weight(NamedTuple):
    """A weight (out, in) in the form that a product takes: quantized by StatsQ, which is done again in backward, or quantized already.

    Attributes:
        weight: the float master, or the quantized weight where there are no `bits`.
        bits: of StatsQ, or None.
        scale: of StatsQ.
        ready: what StatsQ gives, where somebody keeps it.
    """

    weight: Tensor
    bits: int | None
    scale: Tensor | None
    ready: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bits: int | None, ready: Tensor | None) -> Weight:
        """A weight whose scale is not yet known."""
        return cls(weight, bits, statsq_scale(weight) if bits is not None and ready is None else None, ready)

    def quantized(self, dtype: torch.dtype) -> Tensor:
        """The factor of a product in `dtype`."""
        if self.ready is not None:
            return self.ready.to(dtype)
        if self.bits is None or self.scale is None:
            return self.weight.to(dtype)
        return kernels.statsq_forward(self.weight, self.scale, self.bits, dtype)


class _LsqLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        scale, before, after, weight, bias, settings, bits, ready = args
        dtype = product_dtype(x)
        kept = keep(x)
        ctx.make, ctx.settings, ctx.bits, ctx.dtype = kept.make, settings, bits, dtype
        w = Weight.of(weight, bits, ready)
        ctx.save_for_backward(scale, before, after, weight, bias, w.scale, ready, *kept.tensors)
        xq = LSQParams(scale, before, after, *settings).forward(x, dtype)
        return F.linear(xq, w.quantized(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, before, after, weight, bias, w_scale, ready, *saved = ctx.saved_tensors
        x = recompute(ctx.make, tuple(saved))
        operand = LSQParams(scale, before, after, *ctx.settings)
        if torch.is_grad_enabled():
            out = simple.lsq_linear(x, operand, weight, bias, ctx.bits)
            return *simple.gradients(out, [x, *operand.tensors, weight, bias], ctx.needs_input_grad, grad), None, None, None
        grad = grad.reshape(-1, grad.shape[-1])
        of_bias = grad.sum(0) if bias is not None or after is not None else None
        wq = Weight(weight, ctx.bits, w_scale, ready).quantized(ctx.dtype)
        of_xq = (grad @ wq).view(x.shape)
        # The offset behind is a constant row of the input: its gradient goes through the product as the bias's does.
        of_after = None if after is None or of_bias is None else (of_bias.unsqueeze(0) @ wq).squeeze(0).float()
        wanted = ctx.dtype if ctx.needs_input_grad[4] else None
        found = operand.backward(of_xq, x, with_after=False, in_place=True, dequantized=wanted)
        xq = found.dequantized
        of_weight = None if xq is None else (grad.t() @ xq.flatten(0, -2)).to(weight.dtype)
        shown = None if bias is None or of_bias is None else of_bias.to(bias.dtype)
        return found.x, found.scale, found.before, of_after, of_weight, shown, None, None, None


def lsq_linear(x: Tensor, operand: LSQParams, weight: Tensor, bias: Tensor | None, bits: int | None, ready: Tensor | None = None) -> Tensor:
    """q(x) @ q(W)^T + b.

    Args:
        x: (..., in), any float dtype.
        operand: its quantizer.
        weight: (out, in), the float master of StatsQ, or the quantized weight where `bits` is None.
        bias: (out,) or None.
        bits: of StatsQ, or None.
        ready: what StatsQ gives, where somebody keeps it; without gradient.

    Returns:
        (..., out), in the dtype of `x`, or autocast's.
    """
    return _LsqLinear.apply(x, *operand.tensors, weight, bias, operand.settings, bits, ready)
