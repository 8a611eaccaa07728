"""From scores to what leaves the heads, and back: the half that attention with and without query-key reparameterization share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels import LSQParams, Made, operators
from qat.kernels.fused.heads import ROWS, heads_of, heads_product
from qat.kernels.fused.operand import probs_dtype, product_dtype


class Scoring(NamedTuple):
    """What happens to scores, and how.

    Attributes:
        bias: (h, N, N), added for every image, or None.
        mask: (W, N, N) without gradient, added to the W windows that follow each other along the batch, or None.
        num_heads: h.
        factor: what they are multiplied by.
        keep_probs: keep the probabilities for backward, and the product with the folded matrix; else they are made again.
    """

    bias: Tensor | None
    mask: Tensor | None
    num_heads: int
    factor: float
    keep_probs: bool


class ScoreShape(NamedTuple):
    """Sizes that the halves share.

    Attributes:
        num_heads: h.
        factor: what scores are multiplied by.
        dtype: of the factors of products.
        probs_dtype: of the probabilities; None = float32, made of the scores again in backward, in the pass of their quantizer.
    """

    num_heads: int
    factor: float
    dtype: torch.dtype
    probs_dtype: torch.dtype | None

    @property
    def kind(self) -> str:
        """Of `Made`, for what `to_keep` gives."""
        return "softmax" if self.probs_dtype else "scores"


def shape_for(x: Tensor, num_heads: int, factor: float) -> ScoreShape:
    """Under autocast, products are in its dtype and softmax is in float32; else all is in the dtype of `x`.

    On CUDA backward is given scores: half the memory of probabilities, which cost less to make than to read.
    """
    return ScoreShape(
        num_heads, factor, product_dtype(x), None if x.device.type in ROWS else probs_dtype(x)
    )


def to_keep(scores: Tensor, bias: Tensor | None, mask: Tensor | None, shape: ScoreShape) -> Tensor:
    """What is kept: probabilities (h, B, N, M) of scaled scores, zero from the N-th key on, or what they are made of.

    Args:
        scores: (h, B, N, M), the keys padded; may be written to.
        bias: (h, N, N), added for every image; None = nothing.
        mask: (W, N, N), added to the W windows that follow each other along B; None = nothing.
        shape: see there.
    """
    more = scores.shape[-1] - scores.shape[-2]
    bias, mask = (F.pad(t, (0, more)) if t is not None and more else t for t in (bias, mask))
    if bias is not None:
        scores = scores + bias.unsqueeze(1)
    if mask is not None:
        scores = (scores.unflatten(1, (-1, mask.shape[0])) + mask).flatten(1, 2)
    if more:
        scores[..., -more:].fill_(-torch.inf)
    return scores.softmax(-1, dtype=shape.probs_dtype) if shape.probs_dtype else scores


def gather(found: Tensor, values: Tensor, operand: LSQParams, shape: ScoreShape) -> Tensor:
    """Quantized probabilities (h, B, N, M), of what `to_keep` gave, times quantized, padded values (B, M, h*d): (B, N, h*d)."""
    probs = Made(shape.kind).forward(found, None, None)[0]
    out = values.new_empty(*probs.shape[1:3], values.shape[-1])
    quantized = operators.quantize(operand, probs, shape.dtype)
    heads_product(quantized, heads_of(values, shape.num_heads), heads_of(out, shape.num_heads), 1.0)
    return out


def gather_backward(
    grad: Tensor,
    found: Tensor,
    values: Tensor,
    operand: LSQParams,
    shape: ScoreShape,
    *,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `gather(softmax(factor * scores + bias))`.

    Args:
        grad: of its result (B, N, h*d).
        found: (h, B, N, M), what `to_keep` gave.
        values: as in the forward pass.
        operand: as in the forward pass.
        shape: as in the forward pass.
        with_bias: whether there was one.

    Returns:
        Those of the unscaled scores (h, B, N, M), in the dtype of products, of the quantized values (B, M, h*d), of the scale of the
        probabilities, and of the bias, (h, N, N) or None.
    """
    h, n = shape.num_heads, found.shape[-2]
    grads, of_values = heads_of(grad, h), torch.empty_like(values)
    of_scores = grad.new_empty(found.shape)
    heads_product(grads, heads_of(values, h).transpose(-2, -1), of_scores, 1.0)
    # What is summed up for a bias is not rounded before.
    out = (
        torch.empty_like(found, dtype=torch.float32)
        if with_bias and of_scores.dtype != torch.float32
        else of_scores
    )
    made = Made(shape.kind, 1.0 if with_bias else shape.factor)
    grads_of = operators.gradients(
        operand,
        of_scores,
        found,
        out=out,
        dequantized=shape.dtype,
        made=made,
        counted=found[..., :n],
    )
    heads_product(grads_of.dequantized.transpose(-2, -1), grads, heads_of(of_values, h), 1.0)  # type: ignore[union-attr]  # it is asked for
    of_bias = out[..., :n].sum(1) if with_bias else None
    if with_bias and shape.factor != 1:
        out.mul_(shape.factor)
    return out.to(shape.dtype), of_values, grads_of.scale, of_bias
