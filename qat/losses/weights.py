"""Terms on weights: kurtosis regularization and dampening.

Sources: KURE, Shkolnik et al., arXiv 2002.07686 (docs/methods.md); dampening, Nagel et al.,
arXiv 2203.11086.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.kurtosis import UNIFORM_KURTOSIS, check_kure, kure_from_kurtoses, kurtoses
from qat.functional.oscillation import cosine_between
from qat.losses.compose import LossTerm, StepContext
from qat.model.convert import stem_and_heads
from qat.model.sites import iter_quantizers
from qat.quantizers import SquashedGrid, UniformGrid
from qat.utils.validate import check_int, check_number


def latent_weights(net: nn.Module) -> list[Tensor]:
    """Float weights of Linears and `Conv2d`s, except for stem and heads (as in KURE's paper).

    Args:
        net: the net. If it is quantized, the result contains only weights with a quantizer (float
            quantizers count), and the folded matrices of query-key reparameterization.

    Returns:
        The weights in the order of the modules; a weight that layers share appears once.

    Raises:
        UsageError: the net has no such weights.
    """
    weights = [(site.layer, site.latent()) for site in iter_quantizers(net) if site.is_weight]
    if not weights:
        weights = [
            (name, module.weight)
            for name, module in net.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
    excluded_layers = stem_and_heads(net)
    unique_weights = {
        id(weight): weight for layer, weight in weights if layer not in excluded_layers
    }
    if not unique_weights:
        raise UsageError(
            "loss.kure: this model has no linear layers or convolutions besides stem and heads; "
            "must be 0"
        )
    return list(unique_weights.values())


class Kure(LossTerm):
    """(Kurtosis - target)^2 of each tensor of `latent_weights`, reduced to one number.

    A target of 1.8 pulls the weights to a uniform distribution.

    Args:
        weight: factor in the sum; 1.0 in all runs published by the authors of KURE.
        target: target of the kurtosis, above 1.
        reduction: `mean`, `sum` or `max` over the tensors.
    """

    needs_whole_weights = True

    def __init__(
        self, weight: float = 1.0, target: float = UNIFORM_KURTOSIS, reduction: str = "mean"
    ) -> None:
        check_number("loss.kure", weight, 0)
        check_kure("loss.kure_target", target, "loss.kure_reduction", reduction)
        super().__init__(weight)
        self.target = target
        self.reduction = reduction

    def prepare(self, net: nn.Module) -> None:
        """Raise `UsageError` if the net has no weights to regularize."""
        latent_weights(net)

    def forward(self, step: StepContext) -> Tensor:
        """The loss, a scalar."""
        values = kurtoses(latent_weights(step.net))
        detached = values.detach()
        self.logged_values = {
            "kurtosis_mean": detached.mean(),
            "kurtosis_min": detached.min(),
            "kurtosis_max": detached.max(),
        }
        return kure_from_kurtoses(values, self.target, self.reduction)


class Dampening(LossTerm):
    """Sum over weights of (w_q - clip(w, lowest level, highest level))^2, with w_q detached.

    The factor on this sum grows from 0 along half a cosine wave. A weight between two levels is
    pulled to the nearer level; a weight on a level, or outside the outermost levels, is not pulled.
    A folded matrix of query-key reparameterization is treated like any weight; the gradient reaches
    both of its factors.

    Args:
        weight: factor at the end of the run, lambda in the paper.
        max_bits: maximum number of bits; weights with more bits, or with values that are not evenly
            spaced in the unit of the weight, are skipped.
    """

    needs_whole_weights = True

    def __init__(self, weight: float = 0.1, max_bits: int = 4) -> None:
        super().__init__(weight)
        check_int("Dampening.max_bits", max_bits, 2)
        self.max_bits = max_bits

    def forward(self, step: StepContext) -> Tensor:
        """The loss, a scalar, multiplied by the schedule.

        Raises:
            UsageError: the net is frozen, or all of its weights are skipped (see `max_bits`).
        """
        squared_distances = []
        for site in iter_quantizers(step.net):
            if not site.is_weight or site.quantizer.spec.bits > self.max_bits:
                continue
            weight = site.latent().float()
            grid = site.quantizer.grid(weight.detach())
            if isinstance(grid, UniformGrid) and not isinstance(grid, SquashedGrid):
                clipped_weight = weight.clamp(*grid.ends(weight.ndim))
                # Detached: its gradient would cancel the clipped weight's, and reach the step size.
                quantized_weight = site.quantizer(weight).detach()
                squared_distances.append((quantized_weight - clipped_weight).square().sum())
        if not squared_distances:
            raise UsageError(
                f"Dampening.max_bits={self.max_bits}: this model has no weights of at most "
                f"{self.max_bits} bits on a uniform grid; set a higher max_bits, or leave the loss "
                "term out"
            )
        return cosine_between(0.0, 1.0, step.progress) * torch.stack(squared_distances).sum()
