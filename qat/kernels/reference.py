"""What every form of the kernels has to give: the formulas of `qat.functional`, and what is made of them."""

from __future__ import annotations

from torch import Tensor

from qat.functional.lsq import CodeRange, lsq_backward, lsq_forward
from qat.functional.statsq import statsq_forward

__all__ = ["lsq_backward", "lsq_forward", "probs_backward", "statsq_forward"]


def probs_backward(grad: Tensor, probs: Tensor, scale: Tensor, codes: CodeRange, factor: float) -> tuple[Tensor, Tensor]:
    """Gradients after `lsq_forward(softmax(factor * scores))`.

    Args:
        grad: gradient of the quantized probabilities, (..., N, M).
        probs: the probabilities, (..., N, M), not quantized.
        scale: (N,) or (1,), as `codes.axis` says.
        codes: codes and axis.
        factor: what the scores are multiplied by before the softmax.

    Returns:
        The gradient of the scores, and `lsq_backward`'s sum for the scale.
    """
    inner, of_scale, *_ = lsq_backward(grad, probs, scale, None, codes)
    return (inner - (inner * probs).sum(-1, keepdim=True)) * probs * factor, of_scale
