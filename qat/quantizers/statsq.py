"""StatsQ as a module: no parameters, the scale is read off the tensor in every forward. Paper: arXiv 2302.02210."""

from __future__ import annotations

from torch import Tensor

from qat.functional.statsq import statsq, statsq_codes, statsq_codes_with_scale, statsq_scale, statsq_with_scale
from qat.functional.ste import mean_abs, view_along
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("statsq")
def build_statsq(spec: QuantSpec) -> Quantizer:
    """StatsQ for a weight, or `ActStatsQ` for an activation."""
    return StatsQ(spec) if spec.role in {"weight", "qk"} else ActStatsQ(spec)


class StatsQ(Quantizer):
    """Weights (out, ...): one scale per output row, twice the mean magnitude."""

    def forward(self, x: Tensor) -> Tensor:
        """`statsq(x, bits)`."""
        return statsq(x, self.spec.bits)

    def codes(self, x: Tensor) -> Tensor:
        """`statsq_codes(x, bits)`."""
        return statsq_codes(x, self.spec.bits)

    def scale_of(self, x: Tensor) -> Tensor:
        """The scale in force for `x`; broadcasts against it."""
        return statsq_scale(x)


class ActStatsQ(Quantizer):
    """Activations: the statistics of the present batch along the spec's axis. Always signed: StatsQ's grid is symmetric."""

    def forward(self, x: Tensor) -> Tensor:
        """StatsQ with one scale per slice along the axis."""
        return statsq_with_scale(x, self.scale_of(x), self.spec.bits)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [-2^(b-1), 2^(b-1)-1]."""
        return statsq_codes_with_scale(x, self.scale_of(x), self.spec.bits)

    def scale_of(self, x: Tensor) -> Tensor:
        """The scale in force for `x`; broadcasts against it."""
        return view_along(2 * mean_abs(x.detach(), self.axis), x.ndim, self.axis)
