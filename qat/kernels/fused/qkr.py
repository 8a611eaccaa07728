"""Attention with query-key reparameterization as one Function, from its input to what leaves the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels import LSQParams, operators
from qat.kernels.fused.heads import add_products, exact_part, heads_product, pad
from qat.kernels.fused.operand import flat, keep, kept, linear, of_params, params
from qat.kernels.fused.scores import (
    ScoreShape,
    Scoring,
    gather,
    gather_backward,
    shape_for,
    to_keep,
)
from qat.kernels.fused.source import given
from qat.kernels.fused.weight import WeightParams
from qat.kernels.library import differentiated_once


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
    return (
        QkrWeights(*args[:5]),
        (WeightParams(*args[5:8]), WeightParams(*args[8:11])),
        QkrOperands(*params(args[11:])),
    )


def _padded(product: LSQParams, rows: Tensor, x: Tensor, num_heads: int) -> LSQParams:
    """The quantizer of the folded product, with a step for each row (B, M*h, C) of padded tokens where there is one for each of x's."""
    real = num_heads * x.shape[1]
    more = rows.shape[1] - real
    return (
        product._replace(scale=F.pad(product.scale, (0, more), value=1.0))
        if more and product.scale.numel() == real
        else product
    )


def _by_head(rows: Tensor, num_heads: int) -> Tensor:
    """(B, N*h, C) as a view (h, B, N, C)."""
    return rows.unflatten(1, (-1, num_heads)).permute(2, 0, 1, 3)


def _held(  # noqa: PLR0913
    xq: Tensor,
    padded: Tensor,
    keys: Tensor,
    per_key: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    shape: ScoreShape,
) -> Tensor:
    """What is kept for backward, (h, B, N, M), of the quantized input, not and padded, and of keys, not yet quantized."""
    out = xq.new_empty(*keys.shape[:2], xq.shape[1], keys.shape[2])
    factor = exact_part(shape.factor)
    heads_product(xq, keys.transpose(-2, -1), out, factor)
    if per_key is not None:  # times a power of two, both halves of a sum may be multiplied apart
        out.add_(F.linear(padded, per_key.to(shape.dtype)).permute(2, 0, 1).unsqueeze(2) * factor)
    return to_keep(out if factor == shape.factor else out.mul_(shape.factor), bias, mask, shape)


class _Qkr(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        (made_x, x, *norm, made), (bias, mask, num_heads, factor, keep_probs), rest = (
            args[:5],
            args[5:10],
            args[10:],
        )
        weights, (of_m, of_v), operands = _unpack(rest)
        shape = shape_for(x, num_heads, factor)
        (matrix, of_m), (v, of_v) = (
            of_m.begin(weights.matrix, shape.dtype),
            of_v.begin(weights.v, shape.dtype),
        )
        xq = operators.quantize(operands.input, x if made_x is None else made_x, shape.dtype)
        padded = pad(xq)
        mapped = linear(padded, matrix, weights.offset)
        values = linear(padded, v, weights.v_bias)
        rows = mapped.unflatten(-1, (num_heads, -1)).flatten(1, 2)
        keys = operators.quantize(_padded(operands.product, rows, x, num_heads), rows, shape.dtype)
        held = _held(xq, padded, _by_head(keys, num_heads), weights.per_key, bias, mask, shape)
        again = (mapped, held) if keep_probs else (None, None)
        keep(
            ctx,
            x,
            *norm,
            made,
            bias,
            mask,
            shape,
            *again,
            values,
            *weights,
            *of_m,
            *of_v,
            *rest[11:],
        )
        return gather(
            held, operators.quantize(operands.values, values, shape.dtype), operands.probs, shape
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once()
        x, *norm, made, bias, mask, shape, mapped, held, values = (args := kept(ctx))[:10]
        weights, (of_m, of_v), operands = _unpack(args[10:])
        h, n, dtype = shape.num_heads, x.shape[1], shape.dtype
        padded = pad(operators.quantize(operands.input, made.forward(x, *norm)[0], dtype))
        if mapped is None:
            with torch.autocast(x.device.type, enabled=False):  # there may be one around backward
                mapped = linear(padded, of_m.forward(weights.matrix, dtype), weights.offset)
        xq, rows = padded[:, :n], mapped.unflatten(-1, (h, -1)).flatten(1, 2)
        product = _padded(operands.product, rows, x, h)
        keys = _by_head(operators.quantize(product, rows, dtype), h)
        held = _held(xq, padded, keys, weights.per_key, bias, mask, shape) if held is None else held
        quantized = operators.quantize(operands.values, values, dtype)
        of_scores, of_values, of_probs, of_bias = gather_backward(
            grad.to(dtype), held, quantized, operands.probs, shape, with_bias=bias is not None
        )
        del held, quantized, args
        back, of_xq = torch.empty_like(rows), torch.zeros_like(padded)
        add_products(of_scores, keys, of_xq[:, :n])
        heads_product(of_scores.transpose(-2, -1), xq, _by_head(back, h), 1.0)

        def through(
            of_y: Tensor, weight: Tensor, found: WeightParams, of: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            """Add the gradient by a product with a weight, and give those of weight, step and bias."""
            of_xq.view(-1, x.shape[-1]).addmm_(of_y, found.forward(weight, dtype))
            return *found.backward(
                of_y.t() @ padded.flatten(0, -2), weight
            ), None if of is None else of_y.sum(0)

        of_product = operators.gradients(
            product, back, rows, in_place=True, counted=rows[:, : h * n]
        )
        of_matrix, of_step, of_offset = through(
            of_product.x.view(-1, mapped.shape[-1]), weights.matrix, of_m, weights.offset
        )
        of_vectors = None
        if weights.per_key is not None:
            of_vectors = through(
                of_scores.sum(2).permute(1, 2, 0).flatten(0, 1),
                weights.per_key,
                WeightParams(None),
                None,
            )[0]
        of_value = operators.gradients(
            operands.values, of_values, values, in_place=True, counted=values[:, :n]
        )
        of_v_weight, of_v_step, of_v_bias = through(
            of_value.x.flatten(0, -2), weights.v, of_v, weights.v_bias
        )
        of_input = operators.gradients(
            operands.input, of_xq[:, :n].contiguous(), x, in_place=True, norm=tuple(norm), made=made
        )
        of_x = None, of_input.x, of_input.norm_weight, of_input.norm_bias, None
        of_weights = (
            of_matrix,
            of_v_weight,
            of_v_bias,
            of_offset,
            of_vectors,
            None,
            of_step,
            None,
            None,
            of_v_step,
            None,
        )
        of_product = of_product._replace(scale=of_product.scale[: operands.product.scale.numel()])
        of_quantizers = (
            *of_params((of_input, of_product, of_value)),
            of_probs,
            None,
            None,
            None,
            None,
            None,
        )
        return *of_x, of_bias, None, None, None, None, *of_weights, *of_quantizers


def qkr_attention(
    x: Tensor, weights: QkrWeights, params: Params, operands: QkrOperands, scoring: Scoring
) -> Tensor:
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
    return _Qkr.apply(*given(x), *scoring, *weights, *flat((*params, *operands)))
