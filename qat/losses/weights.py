"""Terms on weights: kurtosis regularization and dampening.

Sources: KURE, Shkolnik et al., arXiv 2002.07686 (docs/methods.md); dampening, Nagel et al., arXiv 2203.11086.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.kurtosis import UNIFORM_KURTOSIS, check_kure, kure_of, kurtoses
from qat.functional.oscillation import cosine_between
from qat.losses.compose import LossTerm, StepContext
from qat.model.convert import stem_and_heads
from qat.model.sites import iter_quantizers
from qat.quantizers import SquashedGrid, UniformGrid
from qat.utils.validate import check_int, check_number


def latent_weights(net: nn.Module) -> list[Tensor]:
    """Float weights of the Linears and convolutions of a net but its stem and heads, which KURE's paper leaves out too.

    Args:
        net: quantized: the quantized ones, of query-key reparameterization the folded matrix; float: all.

    Returns:
        The weights in the order of the modules; one that two layers share is there once.

    Raises:
        UsageError: there are none.
    """
    weights = [(site.layer, site.latent()) for site in iter_quantizers(net) if site.is_weight] or [
        (name, module.weight)
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    outside = stem_and_heads(net)
    found = {id(weight): weight for layer, weight in weights if layer not in outside}
    if not found:
        raise UsageError(
            "loss.kure: this model has no linear layers or convolutions besides stem and heads"
        )
    return list(found.values())


class Kure(LossTerm):
    """(Kurtosis - target)^2 of the float weights of each layer, reduced to one number: with 1.8 it pulls weights to a uniform distribution.

    Args:
        weight: factor in the sum; 1.0 in all published runs.
        target: kurtosis, above 1.
        reduction: `mean`, `sum` or `max` over the layers.
    """

    needs_whole_weights = True

    def __init__(
        self, weight: float = 1.0, target: float = UNIFORM_KURTOSIS, reduction: str = "mean"
    ) -> None:
        check_number("loss.kure", weight, 0)
        check_kure("loss.kure_target", target, "loss.kure_reduction", reduction)
        super().__init__(weight)
        self.target, self.reduction = target, reduction

    def prepare(self, net: nn.Module) -> None:
        """Refuse a net without weights to act on."""
        latent_weights(net)

    def forward(self, step: StepContext) -> Tensor:
        """Scalar."""
        values = kurtoses(latent_weights(step.net))
        seen = values.detach()
        self.watched = {
            "kurtosis_mean": seen.mean(),
            "kurtosis_min": seen.min(),
            "kurtosis_max": seen.max(),
        }
        return kure_of(values, self.target, self.reduction)


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
        for site in [
            s
            for s in iter_quantizers(step.net)
            if s.is_weight and s.quantizer.spec.bits <= self.max_bits
        ]:
            weight = site.latent().float()
            grid = site.quantizer.grid(weight.detach())
            if isinstance(grid, UniformGrid) and not isinstance(grid, SquashedGrid):
                inside = weight.clamp(*grid.ends(weight.ndim))
                distances.append(
                    (site.quantizer(weight).detach() - inside).square().sum()
                )  # no gradient to the step size
        if not distances:
            raise UsageError(
                f"loss term Dampening: max_bits={self.max_bits}: this model has no weights of so few bits on a uniform grid"
            )
        return cosine_between(0.0, 1.0, step.progress) * torch.stack(distances).sum()
