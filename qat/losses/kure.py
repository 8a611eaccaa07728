"""Kurtosis regularization. Source: KURE, Shkolnik et al., arXiv 2002.07686; docs/robustness.md."""

from __future__ import annotations

from torch import Tensor, nn

from qat.functional.kurtosis import UNIFORM_KURTOSIS, check_kure, kure_of, kurtoses
from qat.losses.compose import LossTerm, StepContext
from qat.losses.latent_weights import QK_FORMS, LatentWeight, find_latent_weights
from qat.utils.validate import check_choice, check_number


class Kure(LossTerm):
    """(Kurtosis - target)^2 of the float weights of each layer, reduced to one number: with 1.8 it pulls weights to a uniform distribution.

    Args:
        weight: factor in the sum; 1.0 in all published runs.
        target: kurtosis, above 1.
        reduction: `mean`, `sum` or `max` over the layers.
        qk: under query-key reparameterization, the folded `product` or its `factors`.

    Attributes:
        latents: the weights it acts on.
    """

    needs_whole_weights = True

    def __init__(
        self,
        weight: float = 1.0,
        target: float = UNIFORM_KURTOSIS,
        reduction: str = "mean",
        qk: str = "product",
    ) -> None:
        check_number("loss.kure", weight, 0)
        check_kure("loss.kure_target", target, "loss.kure_reduction", reduction)
        check_choice("loss.kure_qk", qk, QK_FORMS)
        super().__init__(weight)
        self.target, self.reduction, self.qk = target, reduction, qk
        self.latents: tuple[LatentWeight, ...] = ()

    def prepare(self, net: nn.Module) -> None:
        """Choose the layers: all quantized Linears and convolutions (of a float net: all) but stem and heads."""
        self.latents = find_latent_weights(net, f"loss.kure={self.weight:g}", self.qk)

    def forward(self, step: StepContext) -> Tensor:
        """Scalar."""
        if not self.latents:
            self.prepare(step.net)
        values = kurtoses(latent.of(step.net) for latent in self.latents)
        seen = values.detach()
        self.watched = {"kurtosis_mean": seen.mean(), "kurtosis_min": seen.min(), "kurtosis_max": seen.max()}
        return kure_of(values, self.target, self.reduction)
