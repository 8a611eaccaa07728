"""E4M3 floats of 8 bits: `fp8`, and `fp8_held` for activations whose scale is not learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.functional.affine import min_max
from qat.functional.block_floats import E4M3_MAX, BlockFormat
from qat.functional.fp8 import E4M3, E4M3Range, fp8, fp8_codes, fp8_scale
from qat.functional.lsq import CodeRange
from qat.functional.observers import RangeState, observe
from qat.functional.ste import TINY, view_along
from qat.quantizers.block_floats import FloatGrid
from qat.quantizers.lsq import LSQ
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class Fp8Grid(FloatGrid):
    """E4M3 values times a scale.

    Attributes:
        factors: scales, (n,), one for each slice along `axis`, or (1,).
        axis: dimension along which scales differ; None = one scale for the tensor.
    """

    qmin: int = -126
    # The last code is NaN.
    qmax: int = 126
    form: BlockFormat = E4M3
    dim: int = 0
    axis: int | None

    def along(self, x: Tensor) -> Tensor:
        """Scales, shaped to broadcast against a tensor."""
        return view_along(self.scales, x.ndim, self.axis)


@register("fp8")
@register("fp8_held")
def build_fp8(spec: QuantSpec) -> Quantizer:
    """Build `Fp8Weight` for the roles `weight` and `qk`, `Fp8` for activations."""
    if spec.role in {"weight", "qk"}:
        return Fp8Weight(spec)
    return Fp8(spec)


class Fp8Weight(Quantizer):
    """Quantizer of weights with the scale max|w| / 448 for each slice along the axis.

    Each forward computes the scales. No value saturates, so every gradient passes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`qat.functional.fp8` with the scales of `x`."""
        latent = x.detach()
        # The value is exact, because `x - latent` is zero.
        return fp8(latent, self._compute_scale(latent), self.axis) + (x - latent)

    def codes(self, x: Tensor) -> Tensor:
        """Bit patterns of E4M3, uint8."""
        return fp8_codes(x, self._compute_scale(x), self.axis)

    def _compute_scale(self, x: Tensor) -> Tensor:
        return fp8_scale(*min_max(x, self.axis))

    def grid(self, x: Tensor | None = None) -> Fp8Grid | None:
        """The grid of `x`. Returns None without `x`."""
        if x is None:
            return None
        return Fp8Grid(axis=self.axis, factors=self._compute_scale(x))


class Fp8(LSQ):
    """Quantizer of activations whose scale starts at max|x| / 448 of the calibration data.

    The scale is learned like LSQ's step size, or keeps its initial value (`fp8_held`).
    """

    method = "minmax"

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        # A scale from the largest value is reliable, however small.
        self.min_reliable = 0.0

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Create a NaN scale per slice along the axis; `fp8_held` does not learn it."""
        super().allocate(shape, device)
        self.requires_grad_(self.spec.quantizer != "fp8_held")

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Extend the range in `state` by a batch, and set the scale from this range."""
        state["range"] = observe(state.get("range"), x, self.axis, self.method)
        self.set_from_range(state["range"], x)

    def set_from_range(self, state: RangeState, x: Tensor) -> None:
        """Set the scale from the range of all batches; `x` is not read."""
        self.set_scale(fp8_scale(*state))

    @property
    def code_range(self) -> CodeRange:
        """The values of E4M3, from -448 to 448."""
        return E4M3Range(-E4M3_MAX, E4M3_MAX, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """`qat.functional.fp8` of `x`."""
        return fp8(x, self.scale, self.axis, self.grad_factor)

    def codes(self, x: Tensor) -> Tensor:
        """Bit patterns of E4M3, uint8."""
        return fp8_codes(x, self.scale, self.axis)

    def grid(self, x: Tensor | None = None) -> Fp8Grid:  # type: ignore[override]
        """Values of E4M3 times the scale."""
        return Fp8Grid(axis=self.axis, factors=self.scale.detach().float().clamp(min=TINY))
