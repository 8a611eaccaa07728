"""What the fused Functions compute, by Functions of one quantizer each."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from qat.functional.lsq import lsq
from qat.functional.statsq import statsq
from qat.kernels import LSQParams
from qat.kernels.fused.heads import split_heads
from qat.kernels.fused.operand import probs_dtype
from qat.kernels.fused.scores import ScoreShape, Scoring, to_probs
from qat.kernels.fused.weight import WeightParams


def quantize(o: LSQParams, x: Tensor) -> Tensor:
    """Fake-quantize `x`."""
    qmin, qmax, axis, half = o.codes
    return lsq(
        x,
        o.scale,
        qmin,
        qmax,
        axis,
        half=half,
        grad_factor=o.grad_factor,
        before=o.before,
        after=o.after,
    )


def quantize_weight(params: WeightParams, weight: Tensor) -> Tensor:
    """Fake-quantize a weight that is not quantized already."""
    if isinstance(params.settings, int):
        return statsq(weight, params.settings)
    return weight if params.lsq is None else quantize(params.lsq, weight)


def lsq_linear(
    x: Tensor, operand: LSQParams, weight: Tensor, params: WeightParams, bias: Tensor | None
) -> Tensor:
    """See `qat.kernels.fused.lsq_linear`."""
    return F.linear(quantize(operand, x), quantize_weight(params, weight), bias)


def _gather(scores: Tensor, values: Tensor, probs: LSQParams, scoring: Scoring) -> Tensor:
    shape = ScoreShape(scoring.num_heads, scoring.factor, scores.dtype, probs_dtype(scores))
    made = to_probs(scores, scoring.bias, scoring.mask, shape)
    return (quantize(probs, made) @ values).permute(1, 2, 0, 3).flatten(2)


def attention(qkv: Tensor, operands: Any, scoring: Scoring) -> Tensor:
    """See `qat.kernels.fused.attention`."""
    q, k, v = (
        split_heads(quantize(o, x), scoring.num_heads)
        for o, x in zip(operands[:3], qkv.chunk(3, -1), strict=True)
    )
    return _gather(q @ k.transpose(-2, -1) * scoring.factor, v, operands[3], scoring)


def qkr_attention(
    x: Tensor,
    weights: Any,
    params: tuple[WeightParams, WeightParams],
    operands: Any,
    scoring: Scoring,
) -> Tensor:
    """See `qat.kernels.fused.qkr_attention`."""
    xq, num_heads = quantize(operands.input, x), scoring.num_heads
    mapped = F.linear(xq, quantize_weight(params[0], weights.matrix).to(xq.dtype), weights.offset)
    keys = quantize(operands.product, mapped.unflatten(-1, (num_heads, -1)).flatten(1, 2))
    scores = xq @ keys.unflatten(1, (-1, num_heads)).permute(2, 0, 3, 1)
    if weights.per_key is not None:
        scores = scores + F.linear(xq, weights.per_key.to(xq.dtype)).permute(2, 0, 1).unsqueeze(2)
    v = quantize(
        operands.values, F.linear(xq, quantize_weight(params[1], weights.v), weights.v_bias)
    )
    return _gather(scores * scoring.factor, split_heads(v, num_heads), operands.probs, scoring)
