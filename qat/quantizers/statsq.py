"""StatsQ as a module, without parameters: each forward computes the scale from the tensor.

Sources: OFQ, arXiv 2302.02210; for `StatsQRMS`, QuEST, arXiv 2502.05003. Deviations:
docs/deviations.md#statsq.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qat import kernels
from qat.functional.statsq import statsq_codes_with_scale, statsq_rms_scale
from qat.functional.ste import mean_abs, view_along
from qat.kernels.fused import WeightParams
from qat.quantizers.grid import UniformGrid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("statsq")
@register("statsq_rms")
def build_statsq(spec: QuantSpec) -> Quantizer:
    """Build `StatsQ` or `StatsQRMS` for a weight, `ActStatsQ` for an activation."""
    if spec.role not in {"weight", "qk"}:
        return ActStatsQ(dataclasses.replace(spec, signed=True))
    if spec.quantizer == "statsq_rms":
        return StatsQRMS(spec)
    return StatsQ(spec)


class StatsQ(Quantizer):
    """StatsQ of weights (out, ...): one scale per output row, twice the mean magnitude.

    Weights (d0, d1, d2) have one scale per index of d1, as in `statsq_scale`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Levels of StatsQ with the scale `scale_of(x)`."""
        return kernels.statsq(x, self.scale_of(x), self.spec.bits)

    def fused_params(self) -> WeightParams:
        """The number of bits; fused Functions compute the scale from the weight."""
        return WeightParams(self.spec.bits)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [-2^(b-1), 2^(b-1)-1]."""
        return statsq_codes_with_scale(x, self.scale_of(x), self.spec.bits)

    def scale_of(self, x: Tensor) -> Tensor:
        """The scale of `x`, which broadcasts against `x`."""
        return kernels.statsq_scale(x)

    def grid(self, x: Tensor | None = None) -> UniformGrid | None:
        """The grid of `x`, in half steps: code k stands for (k + 1/2) s / 2^(b-1).

        Returns:
            The grid; None without `x`.
        """
        if x is None:
            return None
        n = 2 ** (self.spec.bits - 1)
        return UniformGrid(
            qmin=-n,
            qmax=n - 1,
            step=self.scale_of(x).flatten() / n,
            zero_point=-0.5,
            axis=self._axis_of(x),
        )

    def _axis_of(self, x: Tensor) -> int | None:
        """Dimension along which scales differ."""
        return 1 if x.ndim == 3 else 0


class ActStatsQ(StatsQ):
    """StatsQ of activations. Each forward computes the scales along `axis`, or one if it is None.

    The codes are always signed, because StatsQ's grid is symmetric.
    """

    def scale_of(self, x: Tensor) -> Tensor:
        """The scale of `x`, twice the mean magnitude, which broadcasts against `x`."""
        return view_along(2 * mean_abs(x.detach(), self.axis), x.ndim, self.axis)

    def _axis_of(self, x: Tensor) -> int | None:
        return self.axis


class StatsQRMS(StatsQ):
    """StatsQ of weights with a range from the root mean square of all weights that share a scale.

    For normally distributed weights, this range has the least squared error at the spec's bits.
    """

    # This class overrides `forward`, so `Quantizer.__init_subclass__` would reset `grid` without
    # this line.
    grid = StatsQ.grid

    def forward(self, x: Tensor) -> Tensor:
        """Levels of StatsQ; the gradient is zero outside of the range."""
        scale = self.scale_of(x)
        return kernels.statsq(x.clamp(-scale, scale), scale, self.spec.bits).to(x.dtype)

    def scale_of(self, x: Tensor) -> Tensor:
        """`statsq_rms_scale`."""
        return statsq_rms_scale(x, self.spec.bits)
