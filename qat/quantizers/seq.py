"""SEQ: the grid of StatsQ, in half steps, with the learned step size of LSQ.

Source: SEQ of ParetoQ, arXiv 2502.02631. Deviations: docs/deviations.md#seq.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qat.functional.lsq import CodeRange, half_step_init_scale, lsq_codes
from qat.functional.ste import mean_abs
from qat.quantizers.grid import UniformGrid
from qat.quantizers.lsq import LSQ, build_lsq, search_kernel
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("seq")
def build_seq(spec: QuantSpec) -> Quantizer:
    """Build `SEQ` if `spec.signed` is True, else LSQ.

    Many values of an unsigned tensor are zero or close to zero, and SEQ's grid does not contain
    zero.
    """
    if spec.signed:
        return SEQ(spec)
    return build_lsq(spec)


class SEQ(LSQ):
    """LSQ with the values (k + 1/2) s for k in [-n, n - 1], n = 2^(b-1); half are negative."""

    # This class overrides `codes`, so `Quantizer.__init_subclass__` would reset `fused_params`
    # without this line.
    fused_params = LSQ.fused_params

    def initial_scale(self, x: Tensor, qmin: int, qmax: int) -> Tensor:
        """2 * mean|x| / (qmax + 1), or the step size with the least error (`spec.step_init`)."""
        if self.spec.step_init == "mse":
            return half_step_init_scale(x, qmin, qmax, self.axis, search_kernel(x))
        return 2 * mean_abs(x.detach(), self.axis).float() / (qmax + 1)

    @property
    def code_range(self) -> CodeRange:
        """Range of codes of the spec, with `half=True`, and the axis."""
        return CodeRange(self.spec.qmin, self.spec.qmax, self.axis, half=True)

    def codes(self, x: Tensor) -> Tensor:
        """The codes k."""
        return lsq_codes(x, self.scale, self.spec.qmin, self.spec.qmax, self.axis, half=True)

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """Values at odd multiples of half the learned step size."""
        grid = self._grid(self.spec.qmin, self.spec.qmax)
        return dataclasses.replace(grid, zero_point=-0.5)
