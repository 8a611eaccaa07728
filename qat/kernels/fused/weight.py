"""The quantizer of a weight inside a fused Function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.kernels import LSQParams, operators

# Devices on which the quantized weight is saved for backward, because another kernel launch costs
# more than the memory. Elsewhere, backward quantizes the weight again unless it was cached before.
SAVED_ON = {"cuda"}


class WeightParams(NamedTuple):
    """The quantizer of a weight (out, in): StatsQ, LSQ, or none if the weight is already quantized.

    Attributes:
        settings: for StatsQ, the number of bits; for LSQ, codes and gradient factor (see
            `LSQParams`); None if the weight is already quantized.
        scale: for LSQ, the step size, (out,) or (1,); for StatsQ, the scale, which is None until
            `quantize_and_save` computes it.
        cached: the quantized weight without gradient, or None.
    """

    settings: int | tuple[CodeRange, float] | None
    scale: Tensor | None = None
    cached: Tensor | None = None

    @property
    def statsq_bits(self) -> int | None:
        """The number of bits of StatsQ. Returns None for other quantizers."""
        return self.settings if isinstance(self.settings, int) else None

    @property
    def lsq(self) -> LSQParams | None:
        """The parameters of LSQ, which learns its step size. Returns None for other quantizers."""
        if not isinstance(self.settings, tuple) or self.scale is None:
            return None
        codes, grad_factor = self.settings
        return LSQParams(self.scale, None, None, None, codes, grad_factor)

    def quantize_and_save(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, WeightParams]:
        """Quantize in the forward pass.

        Returns:
            The quantized weight in `dtype`, and parameters with which `forward` returns it again in
            backward.
        """
        scale = self.scale
        bits = self.statsq_bits
        if bits is not None and self.cached is None:
            quantized, scale = operators.statsq(weight, bits, dtype)
        else:
            quantized = self.forward(weight, dtype)
        cached = quantized if quantized.device.type in SAVED_ON else self.cached
        return quantized, self._replace(scale=scale, cached=cached)

    def forward(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The quantized weight in `dtype`; StatsQ needs `scale` or `cached`."""
        if self.cached is not None:
            return self.cached.to(dtype)
        bits = self.statsq_bits
        if bits is not None and self.scale is not None:
            return operators.statsq_forward(weight, self.scale, bits, dtype)
        lsq = self.lsq
        if lsq is None:
            return weight.to(dtype)
        return operators.quantize(lsq, weight, dtype)

    def backward(self, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the weight and of LSQ's step size; the latter is None without LSQ.

        Args:
            grad: gradient of the quantized weight; may be overwritten.
            weight: the float weight.
        """
        lsq = self.lsq
        if lsq is None:
            return grad, None
        grads = operators.gradients(lsq, grad, weight, in_place=True)
        return grads.x, grads.scale
