"""From scores to what leaves the heads, and back: the half that attention with and without query-key reparameterization share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.functional.lsq import gradient_scale
from qat.kernels import operators
from qat.kernels.fused.heads import heads_of, heads_product
from qat.kernels.fused.operand import LSQParams, probs_dtype, product_dtype, through


class Scoring(NamedTuple):
    """What happens to scores, and how.

    Attributes:
        num_heads: h.
        factor: what they are multiplied by.
        bias: (h, N, N), added for every image, or None.
        mask: (W, N, N) without gradient, added to the W windows that follow each other along the batch, or None.
        keep_probs: keep the probabilities for backward; else they are made again.
    """

    num_heads: int
    factor: float
    bias: Tensor | None
    mask: Tensor | None
    keep_probs: bool


class ScoreShape(NamedTuple):
    """Sizes that the halves share.

    Attributes:
        num_heads: h.
        factor: what scores are multiplied by.
        dtype: of the factors of products.
        probs_dtype: of the probabilities.
    """

    num_heads: int
    factor: float
    dtype: torch.dtype
    probs_dtype: torch.dtype


def shape_for(x: Tensor, num_heads: int, factor: float) -> ScoreShape:
    """Under autocast, products are in its dtype and softmax is in float32; else all is in the dtype of `x`."""
    return ScoreShape(num_heads, factor, product_dtype(x), probs_dtype(x))


def softmax(scores: Tensor, bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Probabilities (h, B, N, M) of scaled scores, zero from the N-th key on.

    Args:
        scores: (h, B, N, M), the keys padded; may be written to.
        bias: (h, N, N), added for every image; None = nothing.
        mask: (W, N, N), added to the W windows that follow each other along B; None = nothing.
        dtype: of the result, and of what is computed.
    """
    more = scores.shape[-1] - scores.shape[-2]
    bias, mask = (F.pad(t, (0, more)) if t is not None and more else t for t in (bias, mask))
    if bias is not None:
        scores = scores + bias.unsqueeze(1)
    if mask is not None:
        windows = scores.unflatten(1, (-1, mask.shape[0]))
        scores = (windows + mask).flatten(1, 2)
    if more:
        scores[..., -more:] = -torch.inf
    return scores.softmax(-1, dtype=dtype)


def gather(probs: Tensor, values: Tensor, operand: LSQParams, shape: ScoreShape) -> Tensor:
    """Quantized probabilities (h, B, N, M) times quantized, padded values (B, M, h*d): (B, N, h*d)."""
    out = values.new_empty(*probs.shape[1:3], values.shape[-1])
    heads_product(operand.forward(probs, shape.dtype), heads_of(values, shape.num_heads), heads_of(out, shape.num_heads), 1.0)
    return out


class ScoreGradients(NamedTuple):
    """What `gather_backward` gives.

    Attributes:
        scores: of the unscaled scores (h, B, N, M), in the dtype of products.
        values: of the quantized values (B, M, h*d).
        scale: of the scale of the probabilities.
        bias: (h, N, N) or None.
    """

    scores: Tensor
    values: Tensor
    scale: Tensor
    bias: Tensor | None


def gather_backward(
    grad: Tensor, probs: Tensor, values: Tensor, operand: LSQParams, shape: ScoreShape, *, with_bias: bool
) -> ScoreGradients:
    """Gradients of `gather(softmax(factor * scores + bias))`.

    Args:
        grad: of its result (B, N, h*d).
        probs: (h, B, N, M), not quantized.
        values: as in the forward pass.
        operand: as in the forward pass.
        shape: as in the forward pass.
        with_bias: whether there was one.
    """
    h, n = shape.num_heads, probs.shape[-2]
    grads = heads_of(grad, h)
    of_probs = grad.new_empty(probs.shape)
    heads_product(grads, heads_of(values, h).transpose(-2, -1), of_probs, 1.0)
    inner = shape.factor if not with_bias else 1.0
    # What is summed up for a bias is not rounded before.
    out = of_probs if not with_bias or of_probs.dtype == torch.float32 else None
    dtype = through(probs, shape.dtype)
    of_scores = torch.empty_like(probs, dtype=torch.float32) if out is None else out
    of_scale, quantized = operators.probs_backward(of_probs, probs, operand.scale, *operand.codes, inner, of_scores, dtype)
    of_scale = (of_scale * gradient_scale(probs[..., :n], operand.codes, operand.grad_factor)).to(operand.scale.dtype)
    of_values = torch.empty_like(values)
    heads_product(quantized.to(shape.dtype).transpose(-2, -1), grads, heads_of(of_values, h), 1.0)
    del quantized
    of_bias = of_scores[..., :n].sum(1) if with_bias else None
    if with_bias and shape.factor != 1:
        of_scores = of_scores.mul_(shape.factor)
    return ScoreGradients(of_scores.to(shape.dtype), of_values, of_scale, of_bias)
