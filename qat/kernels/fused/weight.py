"""What a fused Function is given of a weight's quantizer. Weights are quantized again in backward: a pass over them is cheap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.kernels import LSQParams, operators

# Where the result of quantizing a weight is kept for backward: a launch costs more there than memory of the size of the weights does.
KEPT = {"cuda"}


class WeightParams(NamedTuple):
    """StatsQ or LSQ of a weight (out, in), or neither, where the weight is quantized already.

    Attributes:
        settings: bits of StatsQ; codes and factor of LSQ, as `LSQParams` has them; None = the weight is quantized already.
        scale: the step of LSQ, (out,) or (1,); the scale of StatsQ, None until `begin` finds it.
        ready: the quantized weight, where somebody keeps it; without gradient.
    """

    settings: int | tuple[CodeRange, float] | None
    scale: Tensor | None = None
    ready: Tensor | None = None

    @property
    def lsq(self) -> LSQParams | None:
        """LSQ, which learns its step; None for all else."""
        if not isinstance(self.settings, tuple) or self.scale is None:
            return None
        return LSQParams(self.scale, None, None, None, *self.settings)

    def begin(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, WeightParams]:
        """`forward`, and what makes the same again: the result, or the scale that StatsQ finds in `weight`."""
        if isinstance(self.settings, int) and self.ready is None:
            made, scale = operators.statsq(weight, self.settings, dtype)
        else:
            made, scale = self.forward(weight, dtype), self.scale
        return made, self._replace(
            scale=scale, ready=made if made.device.type in KEPT else self.ready
        )

    def forward(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor of a product in `dtype`."""
        if self.ready is not None:
            return self.ready.to(dtype)
        if isinstance(self.settings, int) and self.scale is not None:
            return operators.statsq_forward(weight, self.scale, self.settings, dtype)
        lsq = self.lsq
        return weight.to(dtype) if lsq is None else operators.quantize(lsq, weight, dtype)

    def backward(self, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the weight and of LSQ's step.

        Args:
            grad: of the result of `forward`; may take the gradient of the weight.
            weight: its argument.
        """
        lsq = self.lsq
        if lsq is None:
            return grad, None
        found = operators.gradients(lsq, grad, weight, in_place=True)
        return found.x, found.scale
