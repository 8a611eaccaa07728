"""Powers of two for softmax probabilities: no scale, nothing to calibrate. Source: FQ-ViT, arXiv 2111.13824."""

from __future__ import annotations

from torch import Tensor

from qat.functional.log2 import fake_quantize_log2, log2_codes
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register


@register("log2")
class Log2(Quantizer):
    """Values in [0, 1] as 2^-k."""

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_log2`."""
        return fake_quantize_log2(x, self.spec.bits)

    def codes(self, x: Tensor) -> Tensor:
        """The exponents k, in [0, 2^b - 1]."""
        return log2_codes(x, self.spec.bits)
