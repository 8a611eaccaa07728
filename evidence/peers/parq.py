"""PARQ of torchao: the optimizer moves weights to their levels. Source: arXiv 2503.15748.

torchao's `QuantOptimizer` keeps the latent weights and writes quantized ones into the model after
each step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from evidence.peers.nets import weight_widths

# Share of the training steps after which all weights are on their levels.
ANNEALED = 0.9
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


def optimizer_factory(
    library: str, build: OptimizerFactory, bits: int, trainer: Trainer
) -> OptimizerFactory:
    """Return a function that builds the optimizer of a model, with PARQ if the library is PARQ.

    Args:
        library: `parq`: weights approach their levels slowly; `parq_hard`: they are rounded in
            each step; any other: the optimizer is not changed.
        build: builds the optimizer of a float model.
        bits: width of weights except in the first and the last layer.
        trainer: knows the number of training steps once training starts.
    """
    if not library.startswith("parq"):
        return build
    return partial(_with_parq, library=library, build=build, bits=bits, trainer=trainer)


def _with_parq(
    net: nn.Module, *, library: str, build: OptimizerFactory, bits: int, trainer: Trainer
) -> torch.optim.Optimizer:
    from torchao.prototype.parq.api import QuantConfig
    from torchao.prototype.parq.optim import ProxHardQuant, ProxPARQ, QuantOptimizer

    base = build(net)
    widths = {module.weight: width for module, width in weight_widths(net, bits).items()}
    quantizers = []
    for group in list(base.param_groups):
        quantized = [parameter for parameter in group["params"] if parameter in widths]
        group["params"] = [parameter for parameter in group["params"] if parameter not in widths]
        for width in sorted({widths[parameter] for parameter in quantized}):
            parameters = [parameter for parameter in quantized if widths[parameter] == width]
            own = {"params": parameters, "quant_bits": width, "name": f"{group['name']}_{width}bit"}
            base.add_param_group({**group, **own})
            quantizers.append(QuantConfig(width).quantizer)
    base.param_groups = [group for group in base.param_groups if group["params"]]
    proximal_map = ProxHardQuant()
    if library == "parq":
        proximal_map = ProxPARQ(0, int(ANNEALED * trainer.estimated_stepping_batches))
    return AfterBackward(
        QuantOptimizer(
            base,
            quantizers[0],
            proximal_map,
            quant_period=1,
            quant_per_channel=True,
            group_quantizer_map=dict(enumerate(quantizers)),
        )
    )


class AfterBackward(torch.optim.Optimizer):
    """Calls the closure of a step before `QuantOptimizer`, which would call it with latent weights.

    Attributes:
        quantizing: the `QuantOptimizer`, whose parameter groups are shared.
    """

    def __init__(self, quantizing: Any) -> None:
        super().__init__(quantizing.param_groups, quantizing.base_optimizer.defaults)
        self.quantizing = quantizing

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Compute the gradients with quantized weights, then update the latent ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.quantizing.step()
        return loss
