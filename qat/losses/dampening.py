"""Dampening: a pull of weights towards the middle of their quantization cell. Source: Nagel et al., arXiv 2203.11086."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.oscillation import cosine_between
from qat.losses.compose import LossTerm, StepContext
from qat.model.sites import iter_quantizers
from qat.quantizers import UniformGrid
from qat.utils.validate import check_int


class Dampening(LossTerm):
    """Sum over weights of (w_q - clip(w, lowest level, highest level))^2, w_q held fixed; its factor grows from 0 along a cosine.

    A weight on a level, and one beyond the outermost level, are left alone; one between two levels is pulled to the nearer. Under
    QKR the folded matrix counts like any weight, and the gradient reaches both of its factors.

    Args:
        weight: factor at the end of the run, lambda in the paper.
        max_bits: weights of more bits are left alone.
    """

    needs_whole_weights = True

    def __init__(self, weight: float = 0.1, max_bits: int = 4) -> None:
        super().__init__(weight)
        check_int("loss term Dampening: max_bits", max_bits, 2)
        self.max_bits = max_bits

    def forward(self, step: StepContext) -> Tensor:
        """Scalar, on the part of `weight` that is in force.

        Raises:
            UsageError: the net has no weights on evenly spaced values of so few bits.
        """
        distances = []
        for site in [s for s in iter_quantizers(step.net) if s.is_weight and s.quantizer.spec.bits <= self.max_bits]:
            weight = site.latent().float()
            grid = site.quantizer.grid(weight.detach())
            if isinstance(grid, UniformGrid):
                inside = weight.clamp(*grid.ends(weight.ndim))
                distances.append((site.quantizer(weight).detach() - inside).square().sum())  # no gradient to the step size
        if not distances:
            raise UsageError(
                f"loss term Dampening: max_bits={self.max_bits}: this net has no weights on evenly spaced values of so few bits"
            )
        return cosine_between(0.0, 1.0, step.progress) * torch.stack(distances).sum()
