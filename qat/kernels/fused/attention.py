"""Attention between its projections as one Function: queries, keys, values and probabilities are quantized again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import gradient_scale
from qat.kernels import LSQParams, operators
from qat.kernels import attention as in_tiles
from qat.kernels.fused.heads import heads_of, heads_product, pad
from qat.kernels.fused.operand import flat, keep, kept, of_params, params
from qat.kernels.fused.scores import (
    ScoreShape,
    Scoring,
    gather,
    gather_backward,
    shape_for,
    to_keep,
)
from qat.kernels.library import differentiated_once


def _quantized(qkv: Tensor, operands: list[LSQParams], dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, (B, N, h*d) each."""
    return [
        operators.quantize(o, x, dtype) for o, x in zip(operands[:3], qkv.chunk(3, -1), strict=True)
    ]


def _scores(q: Tensor, k: Tensor, shape: ScoreShape) -> Tensor:
    """Scaled scores (h, B, N, M) of queries (B, N, h*d) and padded keys (B, M, h*d)."""
    out = q.new_empty(shape.num_heads, q.shape[0], q.shape[1], k.shape[1])
    heads_product(
        heads_of(q, shape.num_heads),
        heads_of(k, shape.num_heads).transpose(-2, -1),
        out,
        shape.factor,
    )
    return out


class _Attention(torch.autograd.Function):
    """Where operators take all of it, scores are never in memory, and the sums of their rows are kept in place of probabilities."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, mask: Tensor | None, *args: Any
    ) -> Tensor:
        (num_heads, factor, keep_probs), operands = args[:3], params(args[3:])
        shape, probs = shape_for(qkv, num_heads, factor), operands[3]
        ctx.in_tiles = (
            bias is None
            and mask is None
            and in_tiles.fits(qkv, num_heads, probs.scale, probs.codes, shape.dtype)
        )
        q, k, v = _quantized(qkv, operands, shape.dtype)
        if ctx.in_tiles:
            out, held = in_tiles.forward(q, k, v, probs.scale, *probs.codes, num_heads, factor)
        else:
            scores = _scores(q, pad(k), shape)
            del q, k
            held = to_keep(scores, bias, mask, shape)
            del scores
            out = gather(held, pad(v), probs, shape)
        keep(ctx, qkv, bias, mask, held if ctx.in_tiles or keep_probs else None, shape, *args[3:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once()
        qkv, bias, mask, held, shape, *rest = kept(ctx)
        operands = params(rest)
        q, k, v = _quantized(qkv, operands, shape.dtype)
        grad, probs, h, of_bias = grad.to(shape.dtype), operands[3], shape.num_heads, None
        if ctx.in_tiles:
            *grads, of_scale = in_tiles.backward(
                grad, held, q, k, v, probs.scale, *probs.codes, h, shape.factor
            )
            scores = held.unsqueeze(-1).expand(*held.shape, held.shape[-1])
            of_scale = of_scale * gradient_scale(scores, probs.codes, probs.grad_factor)
        else:
            k, v = pad(k), pad(v)
            made = to_keep(_scores(q, k, shape), bias, mask, shape) if held is None else held
            of_scores, of_v, of_scale, of_bias = gather_backward(
                grad, made, v, probs, shape, with_bias=bias is not None
            )
            of_q, of_k = torch.empty_like(q), torch.empty_like(k)
            heads_product(of_scores, heads_of(k, h), heads_of(of_q, h), 1.0)
            heads_product(of_scores.transpose(-2, -1), heads_of(q, h), heads_of(of_k, h), 1.0)
            grads = [of_q, of_k[:, : q.shape[1]], of_v[:, : q.shape[1]]]
        of_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        found = [
            operators.gradients(operand, of_x, x, out=out)
            for operand, of_x, x, out in zip(
                operands[:3], grads, qkv.chunk(3, -1), of_qkv.chunk(3, -1), strict=True
            )
        ]
        return (
            of_qkv,
            of_bias,
            None,
            None,
            None,
            None,
            *of_params(found),
            of_scale,
            None,
            None,
            None,
            None,
            None,
        )


def attention(qkv: Tensor, operands: tuple[LSQParams, ...], scoring: Scoring) -> Tensor:
    """q(softmax(factor * q(Q) q(K)^T + bias + mask)) q(V).

    Args:
        qkv: (B, N, 3*h*d), queries, keys and values, each grouped by head.
        operands: quantizers of queries, keys, values (B, N, h*d) and probabilities (..., N, N).
        scoring: see there.

    Returns:
        (B, N, h*d).
    """
    return _Attention.apply(qkv, *scoring, *flat(operands))
