"""Attention with query-key reparameterization as one Function, from its input to what leaves the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.fused.heads import heads_product, is_exact, pad, sum_of_products
from qat.kernels.fused.operand import LSQParams, differentiated_once, keep, kept
from qat.kernels.fused.scores import ScoreShape, Scoring, gather, gather_backward, shape_for, softmax
from qat.kernels.fused.source import given
from qat.kernels.fused.weight import WeightParams


class QkrWeights(NamedTuple):
    """Float masters of the products' factors.

    Attributes:
        matrix: M (h*C, C), float32.
        v: Wv (h*d, C).
        v_bias: (h*d,) or None.
        offset: (h*C,), before the quantizer of the folded product, or None.
        per_key: c (h, C), float32, which adds c_h . q(x[m]) to the scores of key m, or None.
    """

    matrix: Tensor
    v: Tensor
    v_bias: Tensor | None
    offset: Tensor | None
    per_key: Tensor | None


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


Params = tuple[WeightParams, WeightParams]


def _unpack(args: Any) -> tuple[QkrWeights, Params, QkrOperands]:
    operands = QkrOperands(*(LSQParams(*args[i : i + 5]) for i in range(11, 31, 5)))
    return QkrWeights(*args[:5]), (WeightParams(*args[5:8]), WeightParams(*args[8:11])), operands


class _Factors:
    """What forward and backward both make of the input: the factors of the products."""

    def __init__(self, x: Tensor, weights: QkrWeights, params: Params, operands: QkrOperands, shape: ScoreShape) -> None:
        self.weights, self.operands, self.shape = weights, operands, shape
        self.matrix, self.v = params[0].fitted(weights.matrix), params[1].fitted(weights.v)
        self.x = operands.input.forward(x, shape.dtype)
        self.padded = pad(self.x)
        self.steps = operands.product
        more = shape.num_heads * (self.padded.shape[1] - x.shape[1])
        if more and self.steps.scale.numel() == shape.num_heads * x.shape[1]:
            self.steps = self.steps._replace(scale=F.pad(self.steps.scale, (0, more), value=1.0))

    def mapped(self) -> Tensor:
        """M x (B, M, h*C) of the padded input, not yet quantized."""
        offset = self.weights.offset
        matrix = self.matrix.forward(self.weights.matrix, self.shape.dtype)
        return F.linear(self.padded, matrix, None if offset is None else offset.to(self.shape.dtype))

    def values(self) -> Tensor:
        """V (B, M, h*d) of the padded input, not yet quantized."""
        bias = self.weights.v_bias
        return F.linear(self.padded, self.v.forward(self.weights.v, self.shape.dtype), None if bias is None else bias.to(self.shape.dtype))

    def keys(self, mapped: Tensor) -> Tensor:
        """Quantized M x, a view (h, B, M, C)."""
        rows = mapped.unflatten(-1, (self.shape.num_heads, -1)).flatten(1, 2)
        return self.by_head(self.steps.forward(rows, self.shape.dtype))

    def by_head(self, rows: Tensor) -> Tensor:
        """(B, N*h, C) as a view (h, B, N, C)."""
        return rows.unflatten(1, (-1, self.shape.num_heads)).permute(2, 0, 1, 3)

    def probs(self, keys: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Probabilities (h, B, N, M), not yet quantized."""
        out = self.x.new_empty(*keys.shape[:2], self.x.shape[1], keys.shape[2])
        factor = self.shape.factor if is_exact(self.shape.factor) else 1.0
        heads_product(self.x, keys.transpose(-2, -1), out, factor)
        per_key = self.per_key()
        if per_key is not None:  # times a power of two, both halves of a sum may be multiplied apart
            out.add_(per_key * factor)
        return softmax(out if factor == self.shape.factor else out.mul_(self.shape.factor), bias, mask, self.shape.probs_dtype)

    def per_key(self) -> Tensor | None:
        """What is added to the unscaled scores of a key: (h, B, 1, M)."""
        vectors = self.weights.per_key
        return None if vectors is None else F.linear(self.padded, vectors.to(self.shape.dtype)).permute(2, 0, 1).unsqueeze(2)

    def quantized_values(self, values: Tensor) -> Tensor:
        """Of `values`."""
        return self.operands.values.forward(values, self.shape.dtype)


class _Qkr(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        (made_x, x, *norm, made), (bias, mask, num_heads, factor, keep_probs), rest = args[:5], args[5:10], args[10:]
        weights, params, operands = _unpack(rest)
        shape = shape_for(x, num_heads, factor)
        factors = _Factors(x if made_x is None else made_x, weights, params, operands, shape)
        mapped, values = factors.mapped(), factors.values()
        probs = factors.probs(factors.keys(mapped), bias, mask)
        known = bias, mask, shape, mapped, values, probs if keep_probs else None
        keep(ctx, x, *norm, made, *known, *weights, *factors.matrix, *factors.v, *rest[11:])
        return gather(probs, factors.quantized_values(values), operands.probs, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once()
        x, *norm, made, bias, mask, shape, mapped, values, probs = (args := kept(ctx))[:10]
        weights, params, operands = _unpack(args[10:])
        factors = _Factors(made.forward(x, *norm)[0], weights, params, operands, shape)
        keys = factors.keys(mapped)
        probs = factors.probs(keys, bias, mask) if probs is None else probs
        grads = gather_backward(
            grad.to(shape.dtype), probs, factors.quantized_values(values), operands.probs, shape, with_bias=bias is not None
        )
        del probs, args
        of_scores, h, n, width = grads.scores, shape.num_heads, x.shape[1], x.shape[-1]
        of_xq, xq = pad(sum_of_products(of_scores, keys)), factors.padded.flatten(0, -2)
        rows = mapped.unflatten(-1, (h, -1)).flatten(1, 2)
        back = torch.empty_like(rows)
        heads_product(of_scores.transpose(-2, -1), factors.x, factors.by_head(back), 1.0)
        of_product = factors.steps.backward(back, rows, in_place=True, rows=h * n)
        of_mapped = of_product.x.view(-1, mapped.shape[-1])
        of_xq.view(-1, width).addmm_(of_mapped, factors.matrix.forward(weights.matrix, shape.dtype))
        of_matrix, of_step = factors.matrix.backward(of_mapped.t() @ xq, weights.matrix)
        of_vectors = None
        if weights.per_key is not None:
            of_per_key = of_scores.sum(2).permute(1, 2, 0).flatten(0, 1)
            of_xq.view(-1, width).addmm_(of_per_key, weights.per_key.to(shape.dtype))
            of_vectors = (of_per_key.t() @ xq).to(weights.per_key.dtype)
        of_value = operands.values.backward(grads.values, values, in_place=True, rows=n)
        of_v = of_value.x.flatten(0, -2)
        of_xq.view(-1, width).addmm_(of_v, factors.v.forward(weights.v, shape.dtype))
        of_input = operands.input.backward(of_xq[:, :n].contiguous(), x, in_place=True, norm=(norm[0], norm[1]), made=made)
        of_v_weight, of_v_step = factors.v.backward(of_v.t() @ xq, weights.v)
        of_v_bias = None if weights.v_bias is None else of_v.sum(0).to(weights.v_bias.dtype)
        of_offset = None if weights.offset is None else of_mapped.sum(0).to(weights.offset.dtype)
        through = None, of_input.x, of_input.norm_weight, of_input.norm_bias, None
        of_params = None, of_step, None, None, of_v_step, None
        parts = (
            t
            for g in (of_input, of_product._replace(scale=of_product.scale[: operands.product.scale.numel()]), of_value)
            for t in (g.scale, g.before, g.after, None, None)
        )
        of_weights = of_matrix, of_v_weight, of_v_bias, of_offset, of_vectors
        return *through, grads.bias, None, None, None, None, *of_weights, *of_params, *parts, grads.scale, None, None, None, None


def qkr_attention(x: Tensor, weights: QkrWeights, params: Params, operands: QkrOperands, scoring: Scoring) -> Tensor:
    """q(softmax(factor * q(x) . (q(M_h q(x)) + c_h) + bias + mask)) q(V), M and Wv quantized.

    Args:
        x: (B, N, C).
        weights: see there.
        params: quantizers of M (h*C, C) and of Wv.
        operands: see there.
        scoring: see there.

    Returns:
        (B, N, h*d).
    """
    score = scoring.bias, scoring.mask, scoring.num_heads, scoring.factor, scoring.keep_probs
    return _Qkr.apply(*given(x), *score, *weights, *(t for part in (*params, *operands) for t in part))
