"""Min-max affine quantizers: a calibrated range for activations, the present range for weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.functional.affine import affine_codes, affine_from_range, affine_scale, code_range, fake_quantize_affine, min_max
from qat.quantizers.base import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("minmax")
class MinMax(Quantizer):
    """Range of the calibration data, then fixed: asymmetric with a zero point.

    An activation is asymmetric whatever the sign of its spec: the zero point serves the tail of GELU and signed inputs alike.

    Attributes:
        scale: (n,) buffer, in the unit of the input; NaN until initialised.
        zero_point: (n,) buffer, in codes, a whole number stored as float.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.qmin, self.qmax = code_range(spec.bits, signed=False)
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """NaN scale and zero point per slice along the axis."""
        super().allocate(shape, device)
        self.scale, self.zero_point = self.nan_tensor(shape, device), self.nan_tensor(shape, device)

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Smallest and largest value over the batches in `state`, and zero: a zero point in the code range needs it inside."""
        low, high = min_max(x, self.axis)
        zero = torch.zeros_like(low)
        state["low"] = torch.minimum(low, state.get("low", zero))
        state["high"] = torch.maximum(high, state.get("high", zero))
        scale, zero_point = affine_from_range(state["low"], state["high"], self.spec.bits, signed=False)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_affine` on the calibrated range."""
        return fake_quantize_affine(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [0, 2^b - 1]."""
        return affine_codes(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)


@register("minmax_dynamic")
class DynamicMinMax(Quantizer):
    """Symmetric range of the tensor at hand, recomputed in every forward: for weights, which move while they train."""

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_affine` on the present range."""
        return fake_quantize_affine(x, *self._range(x), self.spec.qmin, self.spec.qmax, self.axis)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [-2^(b-1), 2^(b-1)-1]."""
        return affine_codes(x, *self._range(x), self.spec.qmin, self.spec.qmax, self.axis)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return affine_scale(x, self.spec.bits, signed=True, axis=self.axis)
