"""Attention without its projections as one Function, which saves queries, keys and values once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import gradient_scale
from qat.kernels import LSQParams, operators
from qat.kernels import attention as tiled_attention
from qat.kernels.fused.heads import heads_product, pad_tokens, view_by_head
from qat.kernels.fused.operand import (
    flatten_params,
    gradient_of,
    load_saved,
    quantizer_gradient,
    save_for_backward,
    split_fields,
    split_params,
)
from qat.kernels.fused.scores import (
    ScoreShape,
    Scoring,
    shape_for,
    to_probs,
    weigh_values,
    weigh_values_backward,
)
from qat.kernels.library import check_not_double_backward


class _Quantizers(NamedTuple):
    """Quantizers of queries, keys, values and probabilities."""

    q: LSQParams
    k: LSQParams
    v: LSQParams
    probs: LSQParams


class _Inputs(NamedTuple):
    """Inputs of `_Attention`, or their gradients."""

    qkv: Tensor
    scoring: Scoring
    quantizers: _Quantizers


def _flatten(inputs: _Inputs) -> tuple[Any, ...]:
    """Turn the inputs into the positional arguments that autograd sees."""
    return inputs.qkv, *inputs.scoring, *flatten_params(inputs.quantizers)


def _unflatten(args: Any) -> _Inputs:
    """The inverse of `_flatten`."""
    qkv, *others = args
    scoring, rest = split_fields(others, Scoring)
    return _Inputs(qkv, scoring, _Quantizers(*split_params(rest)))


def _quantize_qkv(inputs: _Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The quantized queries, keys and values, (B, N, h*d) each."""
    q, k, v = inputs.qkv.chunk(3, -1)
    quantizers = inputs.quantizers
    return (
        operators.quantize(quantizers.q, q, dtype),
        operators.quantize(quantizers.k, k, dtype),
        operators.quantize(quantizers.v, v, dtype),
    )


def _is_tiled(inputs: _Inputs, shape: ScoreShape) -> bool:
    """True if one kernel computes everything after `_quantize_qkv`, writing no scores to memory."""
    if inputs.scoring.bias is not None or inputs.scoring.mask is not None:
        return False
    probs = inputs.quantizers.probs
    return tiled_attention.fits(inputs.qkv, shape.num_heads, probs.scale, probs.codes, shape.dtype)


def _scores(q: Tensor, k: Tensor, shape: ScoreShape) -> Tensor:
    """Scaled scores (h, B, N, M) of queries (B, N, h*d) and padded keys (B, M, h*d)."""
    scores = q.new_empty(shape.num_heads, q.shape[0], q.shape[1], k.shape[1])
    q_heads = view_by_head(q, shape.num_heads)
    k_heads = view_by_head(k, shape.num_heads)
    heads_product(q_heads, k_heads.transpose(-2, -1), scores, shape.factor)
    return scores


class _Attention(torch.autograd.Function):
    """Attention as in the code below, where `q_*` are quantizers. Backward quantizes q, k, v again.

    q, k, v = qkv.chunk(3, -1)  # (B, N, h*d)
    q, k, v = view_by_head(q_q(q)), view_by_head(q_k(k)), view_by_head(q_v(v))  # (h, B, N, d)
    probs = softmax(factor * q @ k.transpose(-2, -1) + bias + mask)
    return (q_probs(probs) @ v).permute(1, 2, 0, 3).flatten(2)  # (B, N, h*d)

    Where possible, one kernel computes all that follows the quantizers of q, k and v, and
    logarithms of the softmax's denominators are saved instead of the probabilities.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = _unflatten(args)
        scoring = inputs.scoring
        probs_params = inputs.quantizers.probs
        shape = shape_for(inputs.qkv, scoring.num_heads, scoring.factor)
        ctx.is_tiled = _is_tiled(inputs, shape)
        q, k, v = _quantize_qkv(inputs, shape.dtype)
        if ctx.is_tiled:
            out, log_sums = tiled_attention.forward(
                q, k, v, probs_params.scale, *probs_params.codes, scoring.num_heads, scoring.factor
            )
            save_for_backward(ctx, *args, shape, log_sums)
            return out
        scores = _scores(q, pad_tokens(k), shape)
        del q, k
        probs = to_probs(scores, scoring.bias, scoring.mask, shape)
        del scores
        save_for_backward(ctx, *args, shape, probs if scoring.save_probs else None)
        return weigh_values(probs, pad_tokens(v), probs_params, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_not_double_backward()
        *args, shape, saved_softmax = load_saved(ctx)
        inputs = _unflatten(args)
        qkv = inputs.qkv
        qkv_q = _quantize_qkv(inputs, shape.dtype)
        grad = grad.to(shape.dtype)
        backward = _tiled_backward if ctx.is_tiled else _plain_backward
        grads_qkv_q, grad_probs_scale, grad_bias = backward(
            grad, saved_softmax, qkv_q, inputs, shape
        )

        grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        quantizer_grads = []
        for quantizer, grad_x_q, x, out in zip(
            inputs.quantizers[:3], grads_qkv_q, qkv.chunk(3, -1), grad_qkv.chunk(3, -1), strict=True
        ):
            input_grads = operators.gradients(quantizer, grad_x_q, x, out=out)
            quantizer_grads.append(quantizer_gradient(input_grads))
        quantizer_grads.append(gradient_of(LSQParams, scale=grad_probs_scale))
        gradients = _Inputs(
            qkv=grad_qkv,
            scoring=gradient_of(Scoring, bias=grad_bias),
            quantizers=_Quantizers(*quantizer_grads),
        )
        return _flatten(gradients)


_Gradients = tuple[list[Tensor], Tensor, Tensor | None]


def _tiled_backward(
    grad: Tensor,
    log_sums: Tensor,
    qkv_q: tuple[Tensor, Tensor, Tensor],
    inputs: _Inputs,
    shape: ScoreShape,
) -> _Gradients:
    """Gradients of quantized q, k and v, and of the scale of probabilities; None for the bias."""
    probs = inputs.quantizers.probs
    *grads, grad_scale = tiled_attention.backward(
        grad, log_sums, *qkv_q, probs.scale, *probs.codes, shape.num_heads, shape.factor
    )
    # The scores are not in memory, but `gradient_scale` needs only their shape.
    scores = log_sums.unsqueeze(-1).expand(*log_sums.shape, log_sums.shape[-1])
    return grads, grad_scale * gradient_scale(scores, probs.codes, probs.grad_factor), None


def _plain_backward(
    grad: Tensor,
    probs: Tensor | None,
    qkv_q: tuple[Tensor, Tensor, Tensor],
    inputs: _Inputs,
    shape: ScoreShape,
) -> _Gradients:
    """Gradients of quantized q, k and v, of the scale of probabilities, and of the bias or None.

    `probs` is the result of `to_probs`; None = compute it again.
    """
    q, k, v = qkv_q
    num_tokens = q.shape[1]
    k = pad_tokens(k)
    v = pad_tokens(v)
    if probs is None:
        scoring = inputs.scoring
        probs = to_probs(_scores(q, k, shape), scoring.bias, scoring.mask, shape)
    grad_scores, grad_v, grad_scale, grad_bias = weigh_values_backward(
        grad,
        probs,
        v,
        inputs.quantizers.probs,
        shape,
        with_bias=inputs.scoring.bias is not None,
    )
    num_heads = shape.num_heads
    grad_q = torch.empty_like(q)
    grad_k = torch.empty_like(k)
    grad_keys = grad_scores.transpose(-2, -1)
    heads_product(grad_scores, view_by_head(k, num_heads), view_by_head(grad_q, num_heads), 1.0)
    heads_product(grad_keys, view_by_head(q, num_heads), view_by_head(grad_k, num_heads), 1.0)
    return [grad_q, grad_k[:, :num_tokens], grad_v[:, :num_tokens]], grad_scale, grad_bias


def attention(qkv: Tensor, quantizers: tuple[LSQParams, ...], scoring: Scoring) -> Tensor:
    """Compute q(softmax(factor * q(Q) q(K)^T + bias + mask)) q(V), where q(...) quantizes.

    Args:
        qkv: (B, N, 3*h*d), queries, keys and values, each grouped by head.
        quantizers: quantizers of queries, keys, values (B, N, h*d) and probabilities (..., N, N).
        scoring: operations between scores and probabilities.

    Returns:
        (B, N, h*d), in the dtype of `qkv` or of autocast.
    """
    inputs = _Inputs(qkv, scoring, _Quantizers(*quantizers))
    return _Attention.apply(*_flatten(inputs))
