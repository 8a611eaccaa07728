"""Powers of two for softmax probabilities, without a scale to calibrate.

Source: FQ-ViT, arXiv 2111.13824.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.functional.log2 import fake_quantize_log2, log2_codes
from qat.quantizers.grid import Grid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register


@dataclass(frozen=True, kw_only=True)
class PowersOfTwo(Grid):
    """Grid on which code k has the value 2^-k; the last code may also mean zero."""

    @property
    def unit(self) -> float:
        """The smallest power of two that has a code."""
        return 2.0**-self.qmax

    def ends(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """The smallest power of two that has a code, and 1."""
        return torch.tensor(self.unit), torch.ones(())

    def to_code_coordinates(self, x: Tensor) -> Tensor:
        """-log2 of `shift(x)`."""
        return -self.shift(x).log2()

    def dequantize(self, codes: Tensor) -> Tensor:
        """2^-k + `after`."""
        y = torch.exp2(-codes.float())
        if self.after is None:
            return y
        return y + self.after


@register("log2")
class Log2(Quantizer):
    """Quantizer of values in [0, 1] to powers 2^-k and zero."""

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_log2`."""
        return fake_quantize_log2(x, self.spec.bits)

    def codes(self, x: Tensor) -> Tensor:
        """The exponents k, clamped to [0, 2^b - 1]."""
        return log2_codes(x, self.spec.bits)

    def grid(self, x: Tensor | None = None) -> PowersOfTwo:
        """The powers of two from 1 downwards."""
        return PowersOfTwo(qmin=0, qmax=2**self.spec.bits - 1)
