"""Attention with query-key reparameterization as one Function, up to the output of the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.functional.lsq import LsqGradients
from qat.kernels import LSQParams, operators
from qat.kernels.fused.heads import add_products, exact_factor, heads_product, pad_tokens
from qat.kernels.fused.operand import (
    flatten_params,
    gradient_of,
    linear,
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
from qat.kernels.fused.source import FunctionInput, function_input, source_gradient
from qat.kernels.fused.weight import WeightParams
from qat.kernels.library import check_not_double_backward


class QkrWeights(NamedTuple):
    """Weights of the matrix products.

    Attributes:
        matrix: M (h*C, C), the query and key weights of each head, folded into one matrix; float32,
            or the cached quantized matrix if no gradient is needed.
        v: Wv (h*d, C).
        v_bias: (h*d,) or None.
        offset: (h*C,), added to the product M x before its quantizer, or None.
        per_key: c (h, C), float32, or None; it adds c_h . q(x[m]) to the scores of key m.
    """

    matrix: Tensor
    v: Tensor
    v_bias: Tensor | None
    offset: Tensor | None
    per_key: Tensor | None


class QkrQuantizers(NamedTuple):
    """Quantizers of the input and of the intermediate results.

    Attributes:
        input: quantizer of x (B, N, C).
        product: quantizer of M x (B, N*h, C).
        values: quantizer of V (B, N, h*d).
        probs: quantizer of the probabilities (..., N, N).
    """

    input: LSQParams
    product: LSQParams
    values: LSQParams
    probs: LSQParams


class _Inputs(NamedTuple):
    """Inputs of `_Qkr`, or their gradients."""

    source: FunctionInput
    scoring: Scoring
    weights: QkrWeights
    matrix_params: WeightParams
    v_params: WeightParams
    quantizers: QkrQuantizers


def _flatten(inputs: _Inputs) -> tuple[Any, ...]:
    """Turn the inputs into the positional arguments that autograd sees."""
    return (
        *inputs.source,
        *inputs.scoring,
        *inputs.weights,
        *inputs.matrix_params,
        *inputs.v_params,
        *flatten_params(inputs.quantizers),
    )


def _unflatten(args: Any) -> _Inputs:
    """The inverse of `_flatten`."""
    source, scoring, weights, matrix_params, v_params, rest = split_fields(
        args, FunctionInput, Scoring, QkrWeights, WeightParams, WeightParams
    )
    quantizers = QkrQuantizers(*split_params(rest))
    return _Inputs(source, scoring, weights, matrix_params, v_params, quantizers)


def _rows_of_heads(x_times_matrix: Tensor, num_heads: int) -> Tensor:
    """Reshape (B, N, h*C) to (B, N*h, C)."""
    return x_times_matrix.unflatten(-1, (num_heads, -1)).flatten(1, 2)


def _view_rows_by_head(rows: Tensor, num_heads: int) -> Tensor:
    """View (B, N*h, C) as (h, B, N, C)."""
    return rows.unflatten(1, (-1, num_heads)).permute(2, 0, 1, 3)


def _pad_product_quantizer(quantizer: LSQParams, rows: Tensor, num_rows: int) -> LSQParams:
    """The quantizer of the folded product of padded rows.

    If there is a scale for each row, the scales of the padding rows are 1.

    Args:
        quantizer: quantizer of the rows without padding.
        rows: (B, M*h, C), padded from N to M tokens.
        num_rows: N*h, the number of rows without padding.
    """
    num_padded = rows.shape[1] - num_rows
    if num_padded == 0 or quantizer.scale.numel() != num_rows:
        return quantizer
    return quantizer._replace(scale=F.pad(quantizer.scale, (0, num_padded), value=1.0))


def _compute_probs(padded_x: Tensor, keys: Tensor, inputs: _Inputs, shape: ScoreShape) -> Tensor:
    """Compute the scores and apply `to_probs`; the result is (h, B, N, M).

    Args:
        padded_x: (B, M, C), the quantized input, padded from N to M tokens.
        keys: (h, B, M, C), the quantized folded product.
        inputs: inputs of the Function.
        shape: sizes and dtypes.
    """
    num_tokens = inputs.source.origin.shape[1]
    queries = padded_x[:, :num_tokens]
    scores = queries.new_empty(*keys.shape[:2], num_tokens, keys.shape[2])
    # Multiplying by a power of two does not round, so each term of the scores may be multiplied.
    # For any other `shape.factor`, `factor` is 1, and their sum is multiplied at the end.
    factor = exact_factor(shape.factor)
    heads_product(queries, keys.transpose(-2, -1), scores, factor)
    per_key = inputs.weights.per_key
    if per_key is not None:
        key_scores = F.linear(padded_x, per_key.to(shape.dtype)).permute(2, 0, 1)
        scores.add_(key_scores.unsqueeze(2) * factor)
    if factor != shape.factor:
        scores.mul_(shape.factor)
    return to_probs(scores, inputs.scoring.bias, inputs.scoring.mask, shape)


def _linear_backward(
    grad_y: Tensor, x_q: Tensor, grad_x_q: Tensor, weight: Tensor, quantizer: WeightParams
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight and of its step size; the latter is None without LSQ.

    Args:
        grad_y: gradient of the output (B*M, out).
        x_q: quantized input (B, M, C).
        grad_x_q: (B, M, C), to which the gradient of the input is added.
        weight: (out, C).
        quantizer: quantizer of the weight.
    """
    grad_x_q.view(-1, x_q.shape[-1]).addmm_(grad_y, quantizer.forward(weight, x_q.dtype))
    return quantizer.backward(grad_y.t() @ x_q.flatten(0, -2), weight)


def _padded_input(inputs: _Inputs, dtype: torch.dtype) -> Tensor:
    """The quantized input (B, M, C), computed from `origin`."""
    source = inputs.source
    x, *_ = source.producer.forward(source.origin, source.norm_weight, source.norm_bias)
    return pad_tokens(operators.quantize(inputs.quantizers.input, x, dtype))


def _multiply_input(inputs: _Inputs, padded_x: Tensor) -> Tensor:
    """Compute again in backward: input times folded matrix, plus the offset, (B, M, h*C)."""
    weights = inputs.weights
    # Backward may run inside an autocast block.
    with torch.autocast(padded_x.device.type, enabled=False):
        matrix = inputs.matrix_params.forward(weights.matrix, padded_x.dtype)
        return linear(padded_x, matrix, weights.offset)


class _Qkr(torch.autograd.Function):
    """Attention as in the code below: `q_*` are quantizers, and terms that are None are left out.

    x_q = q_input(x)  # (B, N, C)
    x_times_matrix = F.linear(x_q, q_matrix(matrix), offset)  # (B, N, h*C)
    keys = q_product(x_times_matrix.unflatten(-1, (num_heads, -1)).flatten(1, 2))  # (B, N*h, C)
    scores = x_q @ keys.unflatten(1, (-1, num_heads)).permute(2, 0, 3, 1)  # (h, B, N, N)
    scores = scores + F.linear(x_q, per_key).permute(2, 0, 1).unsqueeze(2)
    probs = softmax(factor * scores + bias + mask)
    values = q_values(F.linear(x_q, q_v(v), v_bias))  # (B, N, h*d)
    values = values.unflatten(-1, (num_heads, -1)).permute(2, 0, 1, 3)  # (h, B, N, d)
    return (q_probs(probs) @ values).permute(1, 2, 0, 3).flatten(2)  # (B, N, h*d)
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = _unflatten(args)
        weights = inputs.weights
        quantizers = inputs.quantizers
        scoring = inputs.scoring
        x = inputs.source.origin
        shape = shape_for(x, scoring.num_heads, scoring.factor)
        matrix, matrix_params = inputs.matrix_params.quantize_and_save(weights.matrix, shape.dtype)
        v, v_params = inputs.v_params.quantize_and_save(weights.v, shape.dtype)

        x_q = operators.quantize(quantizers.input, inputs.source.value, shape.dtype)
        padded_x = pad_tokens(x_q)
        x_times_matrix = linear(padded_x, matrix, weights.offset)
        values = linear(padded_x, v, weights.v_bias)
        rows = _rows_of_heads(x_times_matrix, shape.num_heads)
        num_rows = shape.num_heads * x.shape[1]
        product_quantizer = _pad_product_quantizer(quantizers.product, rows, num_rows)
        keys = operators.quantize(product_quantizer, rows, shape.dtype)
        probs = _compute_probs(padded_x, _view_rows_by_head(keys, shape.num_heads), inputs, shape)

        source = inputs.source._replace(result=None)
        saved = inputs._replace(source=source, matrix_params=matrix_params, v_params=v_params)
        product_and_probs = (x_times_matrix, probs) if scoring.save_probs else (None, None)
        save_for_backward(ctx, *_flatten(saved), shape, values, *product_and_probs)
        values_q = operators.quantize(quantizers.values, values, shape.dtype)
        return weigh_values(probs, values_q, quantizers.probs, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_not_double_backward()
        *saved, shape, values, x_times_matrix, probs = load_saved(ctx)
        inputs = _unflatten(saved)
        quantizers = inputs.quantizers
        x = inputs.source.origin
        num_tokens = x.shape[1]
        num_rows = num_tokens * shape.num_heads

        # Compute again what forward did not save.
        padded_x = _padded_input(inputs, shape.dtype)
        if x_times_matrix is None:
            x_times_matrix = _multiply_input(inputs, padded_x)
        rows = _rows_of_heads(x_times_matrix, shape.num_heads)
        product_quantizer = _pad_product_quantizer(quantizers.product, rows, num_rows)
        keys = _view_rows_by_head(
            operators.quantize(product_quantizer, rows, shape.dtype), shape.num_heads
        )
        if probs is None:
            probs = _compute_probs(padded_x, keys, inputs, shape)
        values_q = operators.quantize(quantizers.values, values, shape.dtype)

        # Gradients of scores and values, then of the two factors of the scores.
        grad_scores, grad_values_q, grad_probs_scale, grad_bias = weigh_values_backward(
            grad.to(shape.dtype),
            probs,
            values_q,
            quantizers.probs,
            shape,
            with_bias=inputs.scoring.bias is not None,
        )
        del probs, values_q
        grad_rows = torch.empty_like(rows)
        grad_x_q = torch.zeros_like(padded_x)
        grad_keys = _view_rows_by_head(grad_rows, shape.num_heads)
        add_products(grad_scores, keys, grad_x_q[:, :num_tokens])
        heads_product(grad_scores.transpose(-2, -1), padded_x[:, :num_tokens], grad_keys, 1.0)

        # Gradients through the quantizers, then of the weights and the input.
        product_grads = operators.gradients(
            product_quantizer, grad_rows, rows, in_place=True, unpadded=rows[:, :num_rows]
        )
        values_grads = operators.gradients(
            quantizers.values, grad_values_q, values, in_place=True, unpadded=values[:, :num_tokens]
        )
        grad_x_times_matrix = product_grads.x.view(-1, x_times_matrix.shape[-1])
        grad_values = values_grads.x.flatten(0, -2)
        weight_grads = _weights_backward(
            inputs, padded_x, grad_x_q, grad_x_times_matrix, grad_scores, grad_values
        )
        input_grads = _input_backward(inputs, grad_x_q[:, :num_tokens].contiguous())
        scale = product_grads.scale[: quantizers.product.scale.numel()]
        quantizer_grads = QkrQuantizers(
            input=quantizer_gradient(input_grads),
            product=quantizer_gradient(product_grads._replace(scale=scale)),
            values=quantizer_gradient(values_grads),
            probs=gradient_of(LSQParams, scale=grad_probs_scale),
        )
        scoring_grads = gradient_of(Scoring, bias=grad_bias)
        source_grads = source_gradient(input_grads)
        return _flatten(_Inputs(source_grads, scoring_grads, *weight_grads, quantizer_grads))


def _weights_backward(  # noqa: PLR0913
    inputs: _Inputs,
    padded_x: Tensor,
    grad_x_q: Tensor,
    grad_x_times_matrix: Tensor,
    grad_scores: Tensor,
    grad_values: Tensor,
) -> tuple[QkrWeights, WeightParams, WeightParams]:
    """Gradients of weights and their quantizers; the input's gradient is added to `grad_x_q`."""
    weights = inputs.weights
    grad_matrix, grad_matrix_scale = _linear_backward(
        grad_x_times_matrix, padded_x, grad_x_q, weights.matrix, inputs.matrix_params
    )
    grad_per_key = None
    if weights.per_key is not None:
        grad_key_scores = grad_scores.sum(2).permute(1, 2, 0).flatten(0, 1)
        grad_per_key, _ = _linear_backward(
            grad_key_scores, padded_x, grad_x_q, weights.per_key, WeightParams(None)
        )
    grad_v, grad_v_scale = _linear_backward(
        grad_values, padded_x, grad_x_q, weights.v, inputs.v_params
    )
    gradients = QkrWeights(
        matrix=grad_matrix,
        v=grad_v,
        v_bias=None if weights.v_bias is None else grad_values.sum(0),
        offset=None if weights.offset is None else grad_x_times_matrix.sum(0),
        per_key=grad_per_key,
    )
    matrix_params = gradient_of(WeightParams, scale=grad_matrix_scale)
    v_params = gradient_of(WeightParams, scale=grad_v_scale)
    return gradients, matrix_params, v_params


def _input_backward(inputs: _Inputs, grad_x_q: Tensor) -> LsqGradients:
    """Gradients through the input's quantizer and the operation before this quantizer, if any."""
    source = inputs.source
    return operators.gradients(
        inputs.quantizers.input,
        grad_x_q,
        source.origin,
        in_place=True,
        norm=(source.norm_weight, source.norm_bias),
        producer=source.producer,
    )


def qkr_attention(
    x: Tensor,
    weights: QkrWeights,
    params: tuple[WeightParams, WeightParams],
    quantizers: QkrQuantizers,
    scoring: Scoring,
) -> Tensor:
    """Compute q(softmax(factor * S + bias + mask)) q(V), where q(...) quantizes.

    The score S of query n and key m is q(x[n]) . q(q(M_h) q(x[m]) + offset) + c_h . q(x[m]). The
    values V are q(Wv) q(x) + v_bias.

    Args:
        x: (B, N, C).
        weights: weights of the matrix products.
        params: quantizers of M (h*C, C) and of Wv.
        quantizers: quantizers of the input and of the intermediate results.
        scoring: operations between scores and probabilities.

    Returns:
        (B, N, h*d), in the dtype of `x`; under autocast, in the dtype of autocast.
    """
    inputs = _Inputs(function_input(x), scoring, weights, *params, quantizers)
    return _Qkr.apply(*_flatten(inputs))
