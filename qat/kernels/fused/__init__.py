"""Quantizer and matrix product in one autograd Function: what is cheap to make again is not kept for backward.

Same values as the quantizers and products apart, bit for bit, or within rounding on CUDA, where a softmax is made
again in backward, in the pass of its quantizer or of the whole attention.
"""

from qat.kernels.fused.attention import attention
from qat.kernels.fused.linear import lsq_linear
from qat.kernels.fused.operand import can_fuse, probs_dtype
from qat.kernels.fused.qkr import QkrOperands, QkrWeights, qkr_attention
from qat.kernels.fused.scores import Scoring
from qat.kernels.fused.source import remember, unflattened
from qat.kernels.fused.weight import WeightParams

__all__ = [
    "QkrOperands",
    "QkrWeights",
    "Scoring",
    "WeightParams",
    "attention",
    "can_fuse",
    "lsq_linear",
    "probs_dtype",
    "qkr_attention",
    "remember",
    "unflattened",
]
