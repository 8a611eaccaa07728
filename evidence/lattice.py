"""Distill features on the student's grid: a replacement of `loss.features`.

Use it with `model.imports=[evidence.lattice]`. The term is the mean over the inputs F of `qkv` and
`fc1` in all blocks of mean((Q(F_student) - Q(F_teacher))^2) / var(F_teacher). Q is the student's
quantizer, whose step size gets no gradient from the teacher's side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.lit.teacher import OutputRecorder
from qat.losses.compose import StepContext
from qat.losses.outputs import FeatureDistillation


class Inputs(OutputRecorder):
    """Records the inputs of modules instead of their outputs."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__([])
        for module in modules:
            module.register_forward_pre_hook(self._record_input)

    def _record_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._record(module, args, args[0])


def _layers(net: Any) -> list[Any]:
    layers = []
    for block in net.blocks:
        layers += [block.attn.qkv, block.mlp.fc1]
    return layers


def _forward(self: FeatureDistillation, step: StepContext) -> Tensor:
    total = torch.zeros(())
    layers = _layers(step.net)
    features = zip(layers, step.features, step.teacher_features, strict=True)
    for layer, student_feature, teacher_feature in features:
        with torch.no_grad():
            target = layer.input_quantizer(teacher_feature)
            variance = teacher_feature.var()
        error = (layer.input_quantizer(student_feature) - target).square().mean()
        total = total + error / variance
    return total / len(step.features)


def _inputs_of_blocks(cls: type[OutputRecorder], net: nn.Module, which: str = "all") -> Inputs:
    return Inputs(_layers(net))


OutputRecorder.for_blocks = classmethod(_inputs_of_blocks)  # type: ignore[method-assign, assignment]
FeatureDistillation.forward = _forward  # type: ignore[method-assign]
