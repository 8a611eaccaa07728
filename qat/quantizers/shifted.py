"""Learnable offsets before and after any quantizer. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels import LSQParams
from qat.quantizers.grid import Grid
from qat.quantizers.quantizer import Quantizer


class Shifted(Quantizer):
    """q(x + a) + c with two independent offsets, zero at first: how a symmetric grid serves asymmetric inputs.

    Attributes:
        quantizer: the quantizer in the middle.
        offset_before: a, over the last `spec.offset_ndim` dimensions of the input, in its unit.
        offset_after: c, shaped like the other; absent where it could have no effect (`spec.offsets = "before"`).
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer.spec)
        self.quantizer = quantizer
        self.register_parameter("offset_before", None)
        self.register_parameter("offset_after", None)

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Zero offsets, and the state of the quantizer in the middle."""
        self.quantizer.allocate(shape, device)
        self.axis = self.quantizer.axis
        over = shape[len(shape) - self.spec.offset_ndim :]
        self.offset_before = nn.Parameter(torch.zeros(over, device=device))
        if self.spec.offsets == "both":
            self.offset_after = nn.Parameter(torch.zeros(over, device=device))

    def share_scale(self) -> None:
        """Passed on to the quantizer in the middle."""
        self.quantizer.share_scale()
        self.axis = None

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Calibrate the quantizer in the middle on the shifted input."""
        self.quantizer.calibrate(self._moved(x.detach(), self.offset_before.detach()), state)

    def forward(self, x: Tensor) -> Tensor:
        """q(x + a) + c in float32, returned in the dtype of `x`."""
        return self.quantizer.shifted(x, self.offset_before, self.offset_after).to(x.dtype)

    def operand(self) -> LSQParams | None:
        """That of the quantizer in the middle, with offsets over the last dimension."""
        found = self.quantizer.operand()
        if not isinstance(found, LSQParams) or self.spec.offset_ndim != 1:
            return None
        return found._replace(before=self.offset_before, after=self.offset_after)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of x + a."""
        return self.quantizer.codes(self._moved(x, self.offset_before))

    def grid(self, x: Tensor | None = None) -> Grid | None:
        """That of the quantizer in the middle, with the offsets around it."""
        before, after = (
            None if t is None else t.detach().float()
            for t in (self.offset_before, self.offset_after)
        )
        found = self.quantizer.grid(None if x is None else self._moved(x, self.offset_before))
        return None if found is None else dataclasses.replace(found, before=before, after=after)

    @staticmethod
    def _moved(x: Tensor, offset: Tensor) -> Tensor:
        """The sum x + a in float32, as `forward` has it: a sum in half precision would move values over thresholds."""
        return x.float() + offset.float()

    @property
    def n_scales(self) -> int:
        """Scales of the quantizer in the middle."""
        return self.quantizer.n_scales

    def extra_repr(self) -> str:
        """The offsets; the quantizer prints itself."""
        return f"offsets={self.spec.offsets}"
