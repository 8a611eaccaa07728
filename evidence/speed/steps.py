"""Training steps of several recipes, for timing, counting and tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.lit.teacher import Teacher
from qat.losses import Distillation, StepContext

FLOAT = "float"
MIB = 2**20
TINY = {"img_size": 32, "embed_dim": 48, "num_heads": 3}
_CALIBRATION = 8  # images


@dataclass(frozen=True)
class Arm:
    """A model and its training step.

    Attributes:
        knobs: settings of the recipe; None = the float model.
        teacher: True if the forward pass of a float teacher is part of the step.
        memory: argument of `qat.set_execution`.
        recipe: name of the recipe.
    """

    knobs: dict[str, Any] | None
    teacher: bool = False
    memory: str = "save"
    recipe: str = "ofq"


ARMS = {
    FLOAT: Arm(None),
    "linears": Arm({"attention": "float"}),
    "ofq without qkr": Arm({"attention": "standard"}),
    "ofq": Arm({}),
    "ofq + teacher": Arm({}, teacher=True),
}


def build(model: str, arm: Arm, images: Tensor, *, bits: int = 2, **sizes: Any) -> nn.Module:
    """Build a timm model with random weights, quantized unless the arm is float.

    Args:
        model: timm name of the model.
        arm: recipe and settings.
        images: (B, 3, H, W), on the device of the model; the first eight set the scales.
        bits: width of the recipe.
        sizes: arguments of timm's model.

    Returns:
        The model in training mode.
    """
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=1000, **sizes).to(images.device)
    if arm.knobs is not None:
        recipe = qat.recipe(arm.recipe, bits=bits, **arm.knobs)
        qat.convert(net, recipe, input_size=tuple(images.shape[1:]))
        qat.initialize_scales(net, [images[:_CALIBRATION]])
        qat.set_execution(net, memory=arm.memory)
    return net.train()


def teacher_of(model: str, arm: Arm, images: Tensor, **sizes: Any) -> Teacher | None:
    """The float teacher whose logits the step trains towards; None if the arm has no teacher."""
    if not arm.teacher:
        return None
    return Teacher(build(model, ARMS[FLOAT], images, **sizes))


def training_step(
    net: nn.Module,
    images: Tensor,
    teacher: Callable[[Tensor], Tensor] | None = None,
    *,
    half: bool = False,
) -> Callable[[], Tensor]:
    """Build a training step: forward, loss, backward and fused AdamW.

    Gradients take no memory between steps, as in a real training.

    Args:
        net: model in training mode.
        images: (B, 3, H, W).
        teacher: function that returns the logits to train towards instead of the labels.
        half: True for a forward pass in bfloat16 autocast.

    Returns:
        A function that makes a step and returns the loss.
    """
    target = torch.arange(len(images), device=images.device) % 1000
    distillation = Distillation()
    if teacher is not None and hasattr(net, "set_distilled_training"):
        net.set_distilled_training(enable=True)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True, capturable=images.is_cuda)

    def run() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = net(images)
            if teacher is None:
                loss = F.cross_entropy(logits, target)
            else:
                loss = distillation(StepContext(logits, target, teacher(images), net))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def saved_bytes(net: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that autograd saves for backward in a step: each storage once, no parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    # Keep the storages alive, so that no address is used twice.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storage.nbytes() for storage in saved.values())
