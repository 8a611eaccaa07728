"""Quantizers and matrix products in one `torch.autograd.Function`, called a fused Function.

Backward recomputes cheap tensors instead of saving them. Results are bit-identical to those of
separate quantizers and matrix products, except on CUDA: where the kernel of a quantizer or of the
attention computes a softmax, results are equal within rounding.
"""

from qat.kernels.fused.attention import attention
from qat.kernels.fused.linear import lsq_linear
from qat.kernels.fused.operand import can_fuse, probs_dtype
from qat.kernels.fused.qkr import QkrQuantizers, QkrWeights, qkr_attention
from qat.kernels.fused.scores import Scoring
from qat.kernels.fused.source import attach_source, unflattened
from qat.kernels.fused.weight import WeightParams

__all__ = [
    "QkrQuantizers",
    "QkrWeights",
    "Scoring",
    "WeightParams",
    "attention",
    "can_fuse",
    "lsq_linear",
    "probs_dtype",
    "qkr_attention",
    "attach_source",
    "unflattened",
]
