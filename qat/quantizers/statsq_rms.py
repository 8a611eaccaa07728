"""StatsQ with a range that knows the bits. Source: QuEST, arXiv 2502.05003; docs/deviations.md#statsq-rms."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qat import kernels
from qat.functional.statsq import statsq_rms_scale
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.quantizers.statsq import ActStatsQ, StatsQ
from qat.spec import QuantSpec


@register("statsq_rms")
def build_statsq_rms(spec: QuantSpec) -> Quantizer:
    """StatsQRMS for a weight; activations, for which it was not made, have StatsQ."""
    return StatsQRMS(spec) if spec.role in {"weight", "qk"} else ActStatsQ(dataclasses.replace(spec, signed=True))


class StatsQRMS(StatsQ):
    """Weights (out, ...): a range for each output row by its root mean square, as wide as is best for normal weights at these bits."""

    grid = StatsQ.grid  # said, as `forward` is another

    def forward(self, x: Tensor) -> Tensor:
        """StatsQ's levels; the gradient is zero outside of the range."""
        scale = self.scale_of(x)
        return kernels.statsq(x.clamp(-scale, scale), scale, self.spec.bits).to(x.dtype)

    def scale_of(self, x: Tensor) -> Tensor:
        """`statsq_rms_scale`."""
        return statsq_rms_scale(x, self.spec.bits)
