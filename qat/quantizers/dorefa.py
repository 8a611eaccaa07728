"""DoReFa's weight quantizer, without parameters. Paper: arXiv 1606.06160, equation 9."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.functional.dorefa import squash
from qat.functional.ste import code_dtype, round_ste
from qat.quantizers.grid import UniformGrid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register


@dataclass(frozen=True, kw_only=True)
class SquashedGrid(UniformGrid):
    """Grid with evenly spaced values, in the unit of `squash(x)` instead of the weights."""

    def shift(self, x: Tensor) -> Tensor:
        """`squash(x)`, before the division by the step size."""
        return squash(x.detach())


@register("dorefa")
class DoReFa(Quantizer):
    """Quantizer with 2^bits values from -1 to 1, at odd multiples of half a step.

    The whole tensor has one range. The gradient passes through tanh and the division by the largest
    magnitude, and straight through the rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`qat.functional.dorefa.dorefa`, with a gradient."""
        step = self._step(x)
        codes = round_ste(squash(x) / step - 0.5)
        return ((codes + 0.5) * step).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [-2^(b-1), 2^(b-1)-1]."""
        codes = (squash(x.detach()) / self._step(x) - 0.5).round()
        return codes.to(code_dtype(self.spec.qmin, self.spec.qmax))

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """The grid, which is the same for every tensor."""
        return SquashedGrid(
            qmin=self.spec.qmin, qmax=self.spec.qmax, step=self._step(x).reshape(1), zero_point=-0.5
        )

    def _step(self, x: Tensor | None) -> Tensor:
        device = None if x is None else x.device
        return torch.full((), 2 / (2**self.spec.bits - 1), device=device)
