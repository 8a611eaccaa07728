"""The L1 norm of the loss's gradient, a baseline of robust quantization. Source: Alizadeh et al., arXiv 2002.07520; docs/robustness.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.losses.compose import LossTerm, StepContext
from qat.losses.latent_weights import LatentWeight, check_layers, find_latent_weights
from qat.utils.validate import check_number


class GradL1(LossTerm):
    """Sum of |d CE / d w| over the float weights of the layers: how much the loss can grow if each weight moves by 1, to first order.

    CE is the cross-entropy of the prediction with the batch's targets, whatever else the loss is made of. The term's own gradient goes
    through that of the step, so a step takes about four times as long, and keeps its graph twice. The kernels of fused attention know
    first derivatives alone: attention is computed step by step.

    Args:
        weight: factor in the sum; 0.05 is the paper's order of magnitude.
        layers: globs of layers, or roles; None = all quantized Linears and convolutions (of a float net: all) but stem and heads.

    Attributes:
        latents: the parameters it differentiates by; under query-key reparameterization the two factors.
    """

    differentiates_twice = True
    needs_whole_weights = True

    def __init__(self, weight: float = 0.05, layers: str | Sequence[str] | None = None) -> None:
        check_number("loss.grad_l1", weight, 0)
        super().__init__(weight)
        self.layers = check_layers("loss.grad_l1_layers", layers)
        self.latents: tuple[LatentWeight, ...] = ()

    def prepare(self, net: nn.Module) -> None:
        """Choose the layers; turn fused attention off."""
        self.latents = find_latent_weights(
            net, "loss.grad_l1_layers" if self.layers else f"loss.grad_l1={self.weight:g}", self.layers, "factors"
        )
        for module in net.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]

    def forward(self, step: StepContext) -> Tensor:
        """Scalar, float32; its graph holds the backward pass of the step."""
        if not self.latents:
            self.prepare(step.net)
        task = F.cross_entropy(step.prediction.float(), step.target)
        weights = [latent.of(step.net) for latent in self.latents]
        gradients = torch.autograd.grad(task, weights, create_graph=True, allow_unused=True)
        return torch.stack([gradient.float().abs().sum() for gradient in gradients if gradient is not None]).sum()
