"""The teacher followed on the student's grid: importing this (`model.imports=[evidence.lattice]`) puts it in the place of `loss.features`.

The term is the mean over blocks of ||Q(F_student) - Q(F_teacher)||^2 / var(F_teacher); F are the inputs of `qkv` and `fc1`, Q is the
student's quantizer, whose step size gets no gradient from the teacher's side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.lit.teacher import Outputs
from qat.losses.compose import StepContext
from qat.losses.outputs import FeatureDistillation


class Inputs(Outputs):
    """What modules are given, in place of what they give."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__([])
        for module in modules:
            module.register_forward_pre_hook(self._record_input)

    def _record_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._record(module, args, args[0])


def _followed(net: Any) -> list[Any]:
    return [layer for block in net.blocks for layer in (block.attn.qkv, block.mlp.fc1)]


def _forward(self: FeatureDistillation, step: StepContext) -> Tensor:
    total = torch.zeros(())
    for layer, own, followed in zip(
        _followed(step.net), step.features, step.teacher_features, strict=True
    ):
        with torch.no_grad():
            goal, variance = layer.input_quantizer(followed), followed.var()
        total = total + (layer.input_quantizer(own) - goal).square().mean() / variance
    return total / len(step.features)


Outputs.of_blocks = classmethod(lambda cls, net, which="all": Inputs(_followed(net)))  # type: ignore[method-assign, assignment]
FeatureDistillation.forward = _forward  # type: ignore[method-assign]
