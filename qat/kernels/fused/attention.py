"""Attention between its projections as one Function: queries, keys, values and probabilities are quantized again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.kernels.fused import simple
from qat.kernels.fused.heads import heads_of, product
from qat.kernels.fused.operand import LSQParams
from qat.kernels.fused.scores import ScoreShape, Scoring, gather, gather_backward, shape_for, softmax

Operands = tuple[LSQParams, LSQParams, LSQParams, LSQParams]
_N_TENSORS = 3


def _scores(qkv: Tensor, operands: Operands, shape: ScoreShape) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized queries and keys (B, N, h*d), and their scaled scores (h, B, N, N)."""
    q, k = (o.forward(x, shape.dtype) for o, x in zip(operands[:2], qkv.chunk(3, -1)[:2], strict=True))
    out = q.new_empty(shape.num_heads, q.shape[0], q.shape[1], q.shape[1])
    return q, k, product(heads_of(q, shape.num_heads), heads_of(k, shape.num_heads).transpose(-2, -1), out, factor=shape.factor)


def _values(qkv: Tensor, operands: Operands, shape: ScoreShape) -> Tensor:
    v = qkv.chunk(3, -1)[2]
    return operands[2].forward(v, shape.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, mask: Tensor | None, *args: Any) -> Tensor:
        tensors, (settings, num_heads, factor, keep_probs) = args[:-1], args[-1]
        operands = _operands(tensors, settings)
        ctx.settings, ctx.shape = settings, shape_for(qkv, num_heads, factor)
        q, k, scores = _scores(qkv, operands, ctx.shape)
        del q, k
        probs = softmax(scores, bias, mask, ctx.shape.probs_dtype)
        del scores
        ctx.save_for_backward(qkv, bias, mask, probs if keep_probs else None, *tensors)
        return gather(probs, _values(qkv, operands, ctx.shape), operands[3], ctx.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, mask, probs, *tensors = ctx.saved_tensors
        operands, shape = _operands(tensors, ctx.settings), ctx.shape
        if torch.is_grad_enabled():
            with simple.autocast_of(qkv, shape.dtype, enabled=shape.is_autocast):
                out = simple.attention(qkv, operands, Scoring(shape.num_heads, shape.factor, bias, mask, keep_probs=True))
            return *simple.gradients(out, [qkv, bias, mask, *tensors], ctx.needs_input_grad, grad), None
        q, k, scores = _scores(qkv, operands, shape) if probs is None else (None, None, None)
        if probs is None and scores is not None:
            probs = softmax(scores, bias, mask, shape.probs_dtype)
            del scores
        of_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        of_q, of_k, of_v = of_qkv.chunk(3, -1)
        values = _values(qkv, operands, shape)
        grads = gather_backward(grad.to(shape.dtype), probs, values, operands[3], shape, with_bias=bias is not None)
        of_value = operands[2].backward(grads.values, qkv.chunk(3, -1)[2], out=of_v)
        if q is None or k is None:
            q, k = (o.forward(x, shape.dtype) for o, x in zip(operands[:2], qkv.chunk(3, -1)[:2], strict=True))
        h = shape.num_heads
        back = torch.empty_like(values)
        product(grads.scores, heads_of(k, h), heads_of(back, h))
        of_query = operands[0].backward(back, qkv.chunk(3, -1)[0], out=of_q)
        product(grads.scores.transpose(-2, -1), heads_of(q, h), heads_of(back, h))
        of_key = operands[1].backward(back, qkv.chunk(3, -1)[1], out=of_k)
        parts = [(g.scale, g.before, g.after) for g in (of_query, of_key, of_value)]
        return of_qkv, grads.bias, None, *(t for part in parts for t in part), grads.scale, None, None, None


def _operands(tensors: Any, settings: Any) -> Operands:
    n = _N_TENSORS
    q, k, v, p = (LSQParams(*tensors[n * i : n * i + n], *settings[i]) for i in range(4))
    return q, k, v, p


def attention(qkv: Tensor, operands: Operands, scoring: Scoring) -> Tensor:
    """q(softmax(factor * q(Q) q(K)^T + bias + mask)) q(V).

    Args:
        qkv: (B, N, 3*h*d), queries, keys and values, each grouped by head.
        operands: quantizers of queries, keys, values (B, N, h*d) and probabilities (..., N, N).
        scoring: see there.

    Returns:
        (B, N, h*d).
    """
    tensors = (t for o in operands for t in o.tensors)
    settings = (tuple(o.settings for o in operands), scoring.num_heads, scoring.factor, scoring.keep_probs)
    return _Attention.apply(qkv, scoring.bias, scoring.mask, *tensors, settings)
