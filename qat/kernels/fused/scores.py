"""Forward and backward from scores to the output of the heads.

Standard attention and attention with query-key reparameterization share this code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels import LSQParams, Producer, operators
from qat.kernels.fused.heads import ROW_MULTIPLES, heads_product, view_by_head
from qat.kernels.fused.operand import probs_dtype, product_dtype


class Scoring(NamedTuple):
    """Operations between scores and probabilities.

    Attributes:
        bias: (h, N, N), added to the scores of every image, or None.
        mask: (W, N, N) without gradient, added to the W windows of each image, or None.
        num_heads: h.
        factor: factor on the scores, before bias and mask are added.
        save_probs: True = save the result of `to_probs` for backward, and with query-key
            reparameterization also the product with its folded matrix; False = recompute them. No
            effect if one kernel computes the whole attention.
    """

    bias: Tensor | None
    mask: Tensor | None
    num_heads: int
    factor: float
    save_probs: bool


class ScoreShape(NamedTuple):
    """Sizes and dtypes of scores.

    Attributes:
        num_heads: h.
        factor: factor on the scores.
        dtype: dtype of the factors of matrix products.
        probs_dtype: dtype of the probabilities. It is None on CUDA, where scores are saved instead
            of probabilities: both passes compute the probabilities in float32 from the scores.
    """

    num_heads: int
    factor: float
    dtype: torch.dtype
    probs_dtype: torch.dtype | None

    @property
    def kind(self) -> str:
        """`Producer.kind` of the results of `to_probs`."""
        return "softmax" if self.probs_dtype else "scores"


def shape_for(x: Tensor, num_heads: int, factor: float) -> ScoreShape:
    """Sizes and dtypes for an input `x`; under autocast, matrix products use the dtype of autocast.

    On CUDA, scores are saved for backward instead of probabilities: in half precision, scores take
    half the memory, and computing probabilities from scores is faster than reading probabilities.
    """
    saves_scores = x.device.type in ROW_MULTIPLES
    return ScoreShape(
        num_heads=num_heads,
        factor=factor,
        dtype=product_dtype(x),
        probs_dtype=None if saves_scores else probs_dtype(x),
    )


def _pad_keys(x: Tensor, padding: int) -> Tensor:
    """Pad `x` (..., N) with zeros for `padding` additional keys."""
    return F.pad(x, (0, padding)) if padding else x


def to_probs(scores: Tensor, bias: Tensor | None, mask: Tensor | None, shape: ScoreShape) -> Tensor:
    """Probabilities of scaled scores; the probabilities of padding keys are zero.

    Args:
        scores: (h, B, N, M), the keys padded from N to M; may be overwritten.
        bias: (h, N, N), added to the scores of every image, or None.
        mask: (W, N, N), added to the W windows of each image, or None.
        shape: sizes and dtypes.

    Returns:
        Probabilities (h, B, N, M); if `shape.probs_dtype` is None, the scores before the softmax.
    """
    padding = scores.shape[-1] - scores.shape[-2]
    if bias is not None:
        scores = scores + _pad_keys(bias, padding).unsqueeze(1)
    if mask is not None:
        windows = scores.unflatten(1, (-1, mask.shape[0]))
        scores = (windows + _pad_keys(mask, padding)).flatten(1, 2)
    if padding:
        scores[..., -padding:].fill_(-torch.inf)
    if shape.probs_dtype is None:
        return scores
    return scores.softmax(-1, dtype=shape.probs_dtype)


def weigh_values(probs: Tensor, values: Tensor, quantizer: LSQParams, shape: ScoreShape) -> Tensor:
    """The sum of the values, weighted by the quantized probabilities.

    Args:
        probs: (h, B, N, M), result of `to_probs`: probabilities, or on CUDA the scores before the
            softmax.
        values: (B, M, h*d), quantized and padded.
        quantizer: quantizer of the probabilities.
        shape: sizes and dtypes.

    Returns:
        (B, N, h*d).
    """
    probs, *_ = Producer(shape.kind).forward(probs, None, None)
    out = values.new_empty(*probs.shape[1:3], values.shape[-1])
    probs_q = operators.quantize(quantizer, probs, shape.dtype)
    num_heads = shape.num_heads
    heads_product(probs_q, view_by_head(values, num_heads), view_by_head(out, num_heads), 1.0)
    return out


def weigh_values_backward(
    grad: Tensor,
    probs: Tensor,
    values: Tensor,
    quantizer: LSQParams,
    shape: ScoreShape,
    *,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `weigh_values(softmax(factor * scores + bias + mask), values)`.

    Args:
        grad: gradient of the result (B, N, h*d), in the dtype of `values`.
        probs: (h, B, N, M), result of `to_probs`: probabilities, or on CUDA the scores before the
            softmax.
        values: (B, M, h*d), quantized and padded.
        quantizer: quantizer of the probabilities.
        shape: sizes and dtypes.
        with_bias: True = compute the gradient of the bias.

    Returns:
        Gradients of the unscaled scores (h, B, N, M), in the dtype of matrix products; of the
        quantized values (B, M, h*d); of the scale of the probabilities; of the bias (h, N, N), or
        None.
    """
    num_tokens = probs.shape[-2]
    head_grads = view_by_head(grad, shape.num_heads)
    head_values = view_by_head(values, shape.num_heads)
    grad_values = torch.empty_like(values)
    grad_probs_q = grad.new_empty(probs.shape)
    heads_product(head_grads, head_values.transpose(-2, -1), grad_probs_q, 1.0)

    grad_scores = grad_probs_q  # overwritten
    if with_bias and grad_probs_q.dtype != torch.float32:
        # The gradient of the bias is a sum of gradients of scores; do not round the terms.
        grad_scores = torch.empty_like(probs, dtype=torch.float32)
    grads = operators.gradients(
        quantizer,
        grad_probs_q,
        probs,
        out=grad_scores,
        dequantized=shape.dtype,
        producer=Producer(shape.kind, factor=1.0 if with_bias else shape.factor),
        unpadded=probs[..., :num_tokens],
    )
    probs_q = grads.dequantized
    heads_product(
        probs_q.transpose(-2, -1),  # type: ignore[union-attr]  # requested above
        head_grads,
        view_by_head(grad_values, shape.num_heads),
        1.0,
    )
    grad_bias = None
    if with_bias:
        grad_bias = grad_scores[..., :num_tokens].sum(1)
        if shape.factor != 1:
            grad_scores.mul_(shape.factor)
    return grad_scores.to(shape.dtype), grad_values, grads.scale, grad_bias
