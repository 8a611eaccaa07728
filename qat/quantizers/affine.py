"""Affine quantizers: ranges found by post-training calibration, min-max of calibration data, and the present range for weights."""

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
    observe,
    reaching_zero,
)
from qat.quantizers.grid import UniformGrid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("affine")
class Affine(Quantizer):
    """A fixed range: codes with a zero point. `qat.ptq.calibrate` fills it.

    Attributes:
        scale: (n,) buffer, in the unit of the input; NaN until filled.
        zero_point: (n,) buffer, in codes, a whole number stored as float.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.qmin, self.qmax = spec.qmin, spec.qmax
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """NaN scale and zero point per slice along the axis."""
        super().allocate(shape, device)
        self.scale, self.zero_point = self.nan_tensor(shape, device), self.nan_tensor(shape, device)

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Find the range of a weight by the observer of the spec; those of activations are found on a net that runs in float.

        Raises:
            UsageError: `x` is an activation.
        """
        if self.spec.role != "weight":
            raise UsageError(
                f"scales of role {self.spec.role!r} are found by qat.ptq.calibrate(net, batches), not by initialize_scales"
            )
        self.fill(observe(None, x, self.axis, self.method), x)

    @property
    def method(self) -> str:
        """How its range is found: one of `qat.functional.observers.OBSERVERS`."""
        return self.spec.observer or "minmax"

    def fill(self, state: RangeState, x: Tensor) -> None:
        """Set scale and zero point after the last batch; `x`, that batch, is only read where candidates are tried on it."""
        signed = self.qmin < 0
        self._fill(
            *affine_from_state(
                reaching_zero(state),
                x,
                self.spec.bits,
                signed=signed,
                axis=self.axis,
                method=self.method,
            )
        )

    def _fill(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_affine` on the fixed range, corrected for a weight whose spec says so."""
        y = fake_quantize_affine(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)
        return correct_mean_and_std(y, x, self.axis or 0) if self.spec.bias_correction else y

    def codes(self, x: Tensor) -> Tensor:
        """Codes, zero point included."""
        return affine_codes(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """The fixed range, without the correction of a bias, which is no part of the grid (`spec.bias_correction`)."""
        step, zero = self.scale.float(), self.zero_point.float()
        return UniformGrid(
            qmin=self.qmin, qmax=self.qmax, step=step, zero_point=zero, axis=self.axis
        )


@register("minmax")
class MinMax(Affine):
    """Range of the calibration data, then fixed: asymmetric with a zero point.

    An activation is asymmetric whatever the sign of its spec: the zero point serves the tail of GELU and signed inputs alike.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.qmin, self.qmax = code_range(spec.bits, signed=False)

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Smallest and largest value over the batches in `state`, and zero: a zero point in the code range needs it inside."""
        low, high = min_max(x, self.axis)
        zero = torch.zeros_like(low)
        state["low"] = torch.minimum(low, state.get("low", zero))
        state["high"] = torch.maximum(high, state.get("high", zero))
        self._fill(*affine_from_range(state["low"], state["high"], self.spec.bits, signed=False))


@register("minmax_dynamic")
class DynamicMinMax(Quantizer):
    """Symmetric range of the tensor at hand, recomputed in every forward: for weights, which move while they train."""

    def forward(self, x: Tensor) -> Tensor:
        """`fake_quantize_affine` on the present range."""
        return fake_quantize_affine(x, *self._range(x), self.spec.qmin, self.spec.qmax, self.axis)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [-2^(b-1), 2^(b-1)-1]."""
        return affine_codes(x, *self._range(x), self.spec.qmin, self.spec.qmax, self.axis)

    def grid(self, x: Tensor | None = None) -> UniformGrid | None:
        """That of `x`."""
        if x is None:
            return None
        step, zero = self._range(x)
        return UniformGrid(
            qmin=self.spec.qmin, qmax=self.spec.qmax, step=step, zero_point=zero, axis=self.axis
        )

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for `x`, (n,) each."""
        return affine_scale(x, self.spec.bits, signed=True, axis=self.axis)
