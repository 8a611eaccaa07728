"""Affine quantizers, with ranges from calibration, or from the tensor itself in each forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.affine import (
    affine_codes,
    affine_from_range,
    code_range,
    correct_mean_and_std,
    fake_quantize_affine,
    min_max,
)
from qat.functional.observers import (
    RangeState,
    affine_from_state,
    affine_scale,
    extend_to_zero,
    observe,
)
from qat.quantizers.grid import UniformGrid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("affine")
class Affine(Quantizer):
    """Quantizer with a zero point. Calibration sets its range; forward passes do not change it.

    Attributes:
        scale: (n,) buffer, in the unit of the input; NaN until calibrated.
        zero_point: (n,) buffer, in codes; whole numbers stored as floats, NaN until calibrated.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.qmin = spec.qmin
        self.qmax = spec.qmax
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Create a NaN scale and zero point per slice along the axis."""
        super().allocate(shape, device)
        self.scale = self.nan_tensor(shape, device)
        self.zero_point = self.nan_tensor(shape, device)

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Set scale and zero point of a weight by `method`.

        `qat.ptq.calibrate` finds the ranges of activations, on a net that runs in float.

        Raises:
            UsageError: the role of the spec is not `weight`.
        """
        if self.spec.role != "weight":
            raise UsageError(
                f"initialize_scales: does not set affine scales of activations "
                f"(role {self.spec.role!r}); call qat.ptq.calibrate(net, batches)"
            )
        self.set_from_range(observe(None, x, self.axis, self.method), x)

    @property
    def method(self) -> str:
        """Name of the method that finds the range, one of `qat.functional.observers.OBSERVERS`."""
        return self.spec.observer or "minmax"

    def set_from_range(self, state: RangeState, x: Tensor) -> None:
        """Set scale and zero point after the last batch.

        Args:
            state: range of all batches.
            x: the last batch; only methods that try candidates read it.
        """
        scale, zero_point = affine_from_state(
            extend_to_zero(state),
            x,
            self.spec.bits,
            signed=self.qmin < 0,
            axis=self.axis,
            method=self.method,
        )
        self._set_scale_and_zero_point(scale, zero_point)

    def _set_scale_and_zero_point(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_affine` on the calibrated range, then bias correction if it is set."""
        y = fake_quantize_affine(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)
        if self.spec.bias_correction:
            return correct_mean_and_std(y, x, self.axis or 0)
        return y

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, with the zero point added."""
        return affine_codes(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """The grid of the calibrated range, without the bias correction of the spec."""
        return UniformGrid(
            qmin=self.qmin,
            qmax=self.qmax,
            step=self.scale.float(),
            zero_point=self.zero_point.float(),
            axis=self.axis,
        )


@register("minmax")
class MinMax(Affine):
    """Quantizer of activations, with the range of the calibration data.

    The codes are unsigned, whatever the sign of the spec: with a zero point, they fit signed inputs
    as well as outputs of GELU.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.qmin, self.qmax = code_range(spec.bits, signed=False)

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Extend the range in `state` to include a batch and zero; set scale and zero point.

        The range includes zero, because the zero point must be one of the codes.
        """
        low, high = min_max(x, self.axis)
        zero = torch.zeros_like(low)
        state["low"] = torch.minimum(low, state.get("low", zero))
        state["high"] = torch.maximum(high, state.get("high", zero))
        self._set_scale_and_zero_point(
            *affine_from_range(state["low"], state["high"], self.spec.bits, signed=False)
        )


@register("minmax_dynamic")
class DynamicMinMax(Quantizer):
    """Quantizer of weights, with a symmetric range that each forward computes from the weight.

    If the weight of largest magnitude in a range is positive, it is half a step above the highest
    code. It is then clamped and gets no gradient, as with the symmetric ranges of torch.ao.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_affine` on the range of `x`."""
        return fake_quantize_affine(
            x, *self._scale_and_zero_point(x), self.spec.qmin, self.spec.qmax, self.axis
        )

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [-2^(b-1), 2^(b-1)-1]."""
        return affine_codes(
            x, *self._scale_and_zero_point(x), self.spec.qmin, self.spec.qmax, self.axis
        )

    def grid(self, x: Tensor | None = None) -> UniformGrid | None:
        """The grid of `x`. Returns None without `x`."""
        if x is None:
            return None
        step, zero_point = self._scale_and_zero_point(x)
        return UniformGrid(
            qmin=self.spec.qmin,
            qmax=self.spec.qmax,
            step=step,
            zero_point=zero_point,
            axis=self.axis,
        )

    def _scale_and_zero_point(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range of `x`, (n,) each."""
        return affine_scale(x, self.spec.bits, signed=True, axis=self.axis)
