"""Quantizer and matrix product in one autograd Function, for eager mode: what is cheap to make again is not kept for backward.

Same values as the quantizers and products apart, bit for bit; `torch.compile` gets those, since it decides itself what is kept.
"""

from qat.kernels.fused.attention import attention
from qat.kernels.fused.joint import joint_scores
from qat.kernels.fused.linear import lsq_linear
from qat.kernels.fused.operand import LSQParams, can_fuse, probs_dtype
from qat.kernels.fused.qkr import QkrOperands, QkrWeights, qkr_attention
from qat.kernels.fused.scores import Scoring
from qat.kernels.fused.source import remember, viewed
from qat.kernels.fused.weight import WeightParams

__all__ = [
    "LSQParams",
    "QkrOperands",
    "QkrWeights",
    "Scoring",
    "WeightParams",
    "attention",
    "can_fuse",
    "joint_scores",
    "lsq_linear",
    "probs_dtype",
    "qkr_attention",
    "remember",
    "viewed",
]
