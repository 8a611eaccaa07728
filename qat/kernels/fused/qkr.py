"""Attention with query-key reparameterization as one Function, from its input to what leaves the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.functional.qkr import fold_q_bias, fold_qk
from qat.kernels.fused import simple
from qat.kernels.fused.heads import is_exact, product, sum_of_products
from qat.kernels.fused.operand import LSQParams
from qat.kernels.fused.scores import ScoreShape, Scoring, gather, gather_backward, shape_for, softmax
from qat.kernels.fused.source import keep, recompute
from qat.kernels.fused.weight import WeightParams


class QkrWeights(NamedTuple):
    """Parameters of the products.

    Attributes:
        q: Wq (h*d, C), rows grouped by head.
        k: Wk (h*d, C), rows grouped by head.
        v: Wv (h*d, C), the float master.
        v_bias: (h*d,) or None.
        offset: (h*C,), before the quantizer of the folded product, or None.
        q_bias: (h*d,), of the queries, or None: adds Wk_h^T b_h . q(x[m]) to the scores of key m.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    v_bias: Tensor | None
    offset: Tensor | None
    q_bias: Tensor | None


class QkrOperands(NamedTuple):
    """Quantizers.

    Attributes:
        input: of x (B, N, C).
        product: of M x (B, N*h, C).
        values: of V (B, N, h*d).
        probs: of the probabilities (..., N, N).
    """

    input: LSQParams
    product: LSQParams
    values: LSQParams
    probs: LSQParams


class _Settings(NamedTuple):
    operands: tuple[Any, ...]
    params: tuple[Any, ...]
    num_heads: int
    factor: float
    keep_probs: bool


_N_WEIGHTS = len(QkrWeights._fields)
_Params = tuple[WeightParams, WeightParams]


def _unpack(tensors: Any, settings: _Settings) -> tuple[QkrWeights, QkrOperands]:
    weights, rest = QkrWeights(*tensors[:_N_WEIGHTS]), tensors[_N_WEIGHTS:]
    return weights, QkrOperands(*(LSQParams(*rest[3 * i : 3 * i + 3], *settings.operands[i]) for i in range(4)))


def _params(settings: _Settings, scales: Any, ready: Any) -> _Params:
    matrix, v = (WeightParams(*parts) for parts in zip(settings.params, scales, ready, strict=True))
    return matrix, v


class _Factors:
    """What forward and backward both make of the input: the factors of the products."""

    def __init__(self, x: Tensor, weights: QkrWeights, params: _Params, operands: QkrOperands, shape: ScoreShape) -> None:
        self.weights, self.operands, self.shape = weights, operands, shape
        kept = params[0].ready if params[0].lsq is None else None  # StatsQ's gradient does not read what it quantizes
        self.folded = fold_qk(weights.q, weights.k, shape.num_heads) if kept is None else kept
        self.matrix, self.v = params[0].fitted(self.folded), params[1].fitted(weights.v)
        self.x = operands.input.forward(x, shape.dtype)

    def mapped(self) -> Tensor:
        """M x (B, N, h*C), not yet quantized."""
        offset = self.weights.offset
        return F.linear(self.x, self.matrix.forward(self.folded, self.shape.dtype), None if offset is None else offset.to(self.shape.dtype))

    def values(self) -> Tensor:
        """V (B, N, h*d), not yet quantized."""
        bias = self.weights.v_bias
        return F.linear(self.x, self.v.forward(self.weights.v, self.shape.dtype), None if bias is None else bias.to(self.shape.dtype))

    def keys(self, mapped: Tensor) -> Tensor:
        """Quantized M x, a view (h, B, N, C)."""
        rows = mapped.unflatten(-1, (self.shape.num_heads, -1)).flatten(1, 2)
        return self.by_head(self.operands.product.forward(rows, self.shape.dtype))

    def by_head(self, rows: Tensor) -> Tensor:
        """(B, N*h, C) as a view (h, B, N, C)."""
        return rows.unflatten(1, (-1, self.shape.num_heads)).permute(2, 0, 1, 3)

    def probs(self, keys: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Probabilities (h, B, N, N), not yet quantized."""
        out = self.x.new_empty(self.shape.num_heads, self.x.shape[0], self.x.shape[1], self.x.shape[1])
        scores = product(self.x, keys.transpose(-2, -1), out, factor=self.shape.factor if is_exact(self.shape.factor) else 1.0)
        per_key = self.per_key()
        if per_key is not None:  # times a power of two, both halves of a sum may be multiplied apart
            scores.add_(per_key * self.shape.factor if is_exact(self.shape.factor) else per_key)
        scores = scores if is_exact(self.shape.factor) else scores.mul_(self.shape.factor)
        return softmax(scores, bias, mask, self.shape.probs_dtype)

    def key_vectors(self) -> Tensor | None:
        """What the query bias makes of a key: (h, C)."""
        bias = self.weights.q_bias
        return None if bias is None else fold_q_bias(self.weights.k, bias, self.shape.num_heads).to(self.shape.dtype)

    def per_key(self) -> Tensor | None:
        """What the query bias adds to unscaled scores: (h, B, 1, N)."""
        vectors = self.key_vectors()
        return None if vectors is None else F.linear(self.x, vectors).permute(2, 0, 1).unsqueeze(2)

    def quantized_values(self, values: Tensor) -> Tensor:
        """Of `values`."""
        return self.operands.values.forward(values, self.shape.dtype)


class _Qkr(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: _Settings,
        ready: Any,
        scale: Any,
        v_scale: Any,
        *tensors: Any,
    ) -> Tensor:
        weights, operands = _unpack(tensors, settings)
        kept, shape = keep(x), shape_for(x, settings.num_heads, settings.factor)
        factors = _Factors(x, weights, _params(settings, (scale, v_scale), ready), operands, shape)
        mapped, values = factors.mapped(), factors.values()
        probs = factors.probs(factors.keys(mapped), bias, mask)
        ctx.settings, ctx.shape, ctx.make, ctx.n = settings, shape, kept.make, len(tensors)
        known = (mapped, values, probs if settings.keep_probs else None, factors.matrix.scale, factors.v.scale, *ready)
        ctx.save_for_backward(*tensors, bias, mask, *known, *kept.tensors)
        return gather(probs, factors.quantized_values(values), operands.probs, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors  # to be asked for once: under checkpointing, what it gives is gone afterwards
        tensors, saved = found[: ctx.n], found[ctx.n :]
        bias, mask, mapped, values, probs, *scales_and_ready = saved[:9]
        params = _params(ctx.settings, scales_and_ready[:2], scales_and_ready[2:])
        x = recompute(ctx.make, saved[9:])
        weights, operands = _unpack(tensors, ctx.settings)
        if torch.is_grad_enabled():
            scoring = Scoring(ctx.shape.num_heads, ctx.shape.factor, bias, mask, keep_probs=True)
            with simple.autocast_of(x, ctx.shape.dtype, enabled=ctx.shape.is_autocast):
                out = simple.qkr_attention(x, weights, params, operands, scoring)
            inputs = [x, bias, mask, None, None, *(p.scale for p in params), *tensors]
            return (*simple.gradients(out, inputs, ctx.needs_input_grad, grad),)
        factors = _Factors(x, weights, params, operands, ctx.shape)
        keys = factors.keys(mapped)
        probs = factors.probs(keys, bias, mask) if probs is None else probs
        grads = gather_backward(
            grad.to(ctx.shape.dtype), probs, factors.quantized_values(values), operands.probs, ctx.shape, with_bias=bias is not None
        )
        del probs
        of_weights, of_scales, of_operands, of_x = _through(factors, grads.scores, grads.values, keys, mapped, values, x)
        rest = (*of_operands, (grads.scale, None, None))
        return of_x, grads.bias, None, None, None, *of_scales, *of_weights, *(t for part in rest for t in part)


def _through(factors: _Factors, of_scores: Tensor, of_values: Tensor, keys: Tensor, mapped: Tensor, values: Tensor, x: Tensor) -> Any:
    """Gradients of weights, of their steps, of the quantizers of input, product and values, and of the input."""
    weights, operands, shape = factors.weights, factors.operands, factors.shape
    of_xq = sum_of_products(of_scores, keys)
    rows = mapped.unflatten(-1, (shape.num_heads, -1)).flatten(1, 2)
    back = torch.empty_like(rows)
    product(of_scores.transpose(-2, -1), factors.x, factors.by_head(back))
    of_product = operands.product.backward(back, rows, in_place=True)
    of_mapped = of_product.x.view(-1, mapped.shape[-1])
    of_xq.view(-1, x.shape[-1]).addmm_(of_mapped, factors.matrix.forward(factors.folded, shape.dtype))
    xq = factors.x.flatten(0, -2)
    of_folded, of_step = factors.matrix.backward(of_mapped.t() @ xq, factors.folded)
    of_q, of_k = _unfold(of_folded, weights)
    of_q_bias, vectors = None, factors.key_vectors()
    if vectors is not None:
        of_per_key = of_scores.sum(2).permute(1, 2, 0).flatten(0, 1)
        of_xq.view(-1, x.shape[-1]).addmm_(of_per_key, vectors)
        of_q_bias, through_keys = _unfold_bias(of_per_key.t() @ xq, weights)
        of_k = of_k + through_keys
    of_value = operands.values.backward(of_values, values, in_place=True)
    of_v = of_value.x.flatten(0, -2)
    of_xq.view(-1, x.shape[-1]).addmm_(of_v, factors.v.forward(weights.v, shape.dtype))
    of_input = operands.input.backward(of_xq, x, in_place=True)
    of_v_weight, of_v_step = factors.v.backward(of_v.t() @ xq, weights.v)
    of_weights = (
        of_q,
        of_k,
        of_v_weight,
        None if weights.v_bias is None else of_v.sum(0).to(weights.v_bias.dtype),
        None if weights.offset is None else of_mapped.sum(0).to(weights.offset.dtype),
        of_q_bias,
    )
    parts = tuple((g.scale, g.before, g.after) for g in (of_input, of_product, of_value))
    return of_weights, (of_step, of_v_step), parts, of_input.x


def _unfold(grad: Tensor, weights: QkrWeights) -> tuple[Tensor, Tensor]:
    """Gradients of Wq and Wk from that of M_h = Wq_h^T Wk_h (h*C, C)."""
    h = grad.shape[0] // grad.shape[1]
    of_m = grad.float().unflatten(0, (h, -1))
    q, k = (w.float().unflatten(0, (h, -1)) for w in (weights.q, weights.k))
    of_q, of_k = torch.bmm(k, of_m.transpose(1, 2)).flatten(0, 1), torch.bmm(q, of_m).flatten(0, 1)
    return of_q.to(weights.q.dtype), of_k.to(weights.k.dtype)


def _unfold_bias(grad: Tensor, weights: QkrWeights) -> tuple[Tensor, Tensor]:
    """Gradients of the query bias and of Wk from that of Wk_h^T b_h (h, C)."""
    assert weights.q_bias is not None  # noqa: S101  (narrows a type)
    h, of_vectors = grad.shape[0], grad.float()
    k, b = weights.k.float().unflatten(0, (h, -1)), weights.q_bias.float().unflatten(0, (h, -1))
    of_b = torch.bmm(k, of_vectors.unsqueeze(2)).flatten()
    of_k = (b.unsqueeze(2) * of_vectors.unsqueeze(1)).flatten(0, 1)
    return of_b.to(weights.q_bias.dtype), of_k.to(weights.k.dtype)


def qkr_attention(x: Tensor, weights: QkrWeights, params: _Params, operands: QkrOperands, scoring: Scoring) -> Tensor:
    """q(softmax(factor * q(x) . q(M_h q(x)) + bias + mask)) q(V), with M_h = Wq_h^T Wk_h and Wv quantized.

    Args:
        x: (B, N, C).
        weights: see there.
        params: quantizers of M (h*C, C) and of Wv.
        operands: see there.
        scoring: see there.

    Returns:
        (B, N, h*d).
    """
    settings = _Settings(
        tuple(o.settings for o in operands), tuple(p.settings for p in params), scoring.num_heads, scoring.factor, scoring.keep_probs
    )
    ready, scales = tuple(p.ready for p in params), (p.scale for p in params)
    return _Qkr.apply(x, scoring.bias, scoring.mask, settings, ready, *scales, *weights, *(t for o in operands for t in o.tensors))
