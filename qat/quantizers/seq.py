"""Half steps of a learned size. Source: SEQ of ParetoQ, arXiv 2502.02631; StatsQ's grid with LSQ's step. docs/deviations.md#seq."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qat.functional.lsq import CodeRange, half_step_init_scale, lsq_codes
from qat.functional.ste import mean_abs
from qat.quantizers.grid import UniformGrid
from qat.quantizers.lsq import LSQ, build_lsq, fast_form
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("seq")
def build_seq(spec: QuantSpec) -> Quantizer:
    """SEQ for what is signed; LSQ for what is not, or is found to be: its grid ends at zero, where half of such values are."""
    return SEQ(spec) if spec.signed else build_lsq(spec)


class SEQ(LSQ):
    """LSQ with the values (k + 1/2) s, k in [-n, n - 1], n = 2^(b-1): as many below zero as above."""

    operand = LSQ.operand  # said, as `codes` are others

    def initial_scale(self, x: Tensor, qmin: int, qmax: int) -> Tensor:
        """2 * mean|x| / n, or near it where the squared error is least (`spec.step_init`)."""
        if self.spec.step_init == "mse":
            return half_step_init_scale(x, qmin, qmax, self.axis, fast_form(x))
        return 2 * mean_abs(x.detach(), self.axis).float() / (qmax + 1)

    @property
    def code_range(self) -> CodeRange:
        """Codes and axis."""
        return CodeRange(self.spec.qmin, self.spec.qmax, self.axis, half=True)

    def codes(self, x: Tensor) -> Tensor:
        """Codes k."""
        return lsq_codes(x, self.scale, self.spec.qmin, self.spec.qmax, self.axis, half=True)

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """Half a step beside zero."""
        return dataclasses.replace(self._grid(self.spec.qmin, self.spec.qmax), zero_point=-0.5)
