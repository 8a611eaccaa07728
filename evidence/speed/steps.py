"""Training steps that are timed, counted and checked: the arms, their nets, their steps."""

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
    """A net and its step.

    Attributes:
        knobs: settings of the recipe; None = the float net.
        teacher: whether a float teacher's forward pass is part of the step.
        memory: of `qat.set_execution`.
        recipe: its name.
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
    """A net of timm with random weights where the images (B, 3, H, W) are; converted, scales from them, unless it is the float net."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=1000, **sizes).to(images.device)
    if arm.knobs is not None:
        recipe = qat.recipe(arm.recipe, bits=bits, **arm.knobs)
        qat.initialize_scales(
            qat.convert(net, recipe, input_size=tuple(images.shape[1:])), [images[:_CALIBRATION]]
        )
        qat.set_execution(net, memory=arm.memory)
    return net.train()


def teacher_of(model: str, arm: Arm, images: Tensor, **sizes: Any) -> Teacher | None:
    """The float net whose logits a step follows, if it follows one."""
    return Teacher(build(model, ARMS[FLOAT], images, **sizes)) if arm.teacher else None


def training_step(
    net: nn.Module,
    images: Tensor,
    teacher: Callable[[Tensor], Tensor] | None = None,
    *,
    half: bool = False,
) -> Callable[[], Tensor]:
    """Forward, loss, backward and fused AdamW; gives the loss. As in a run, gradients take no memory between steps.

    Args:
        net: in training mode.
        images: (B, 3, H, W).
        teacher: gives the logits to follow in place of labels.
        half: forward under bfloat16 autocast.
    """
    target, distillation = torch.arange(len(images), device=images.device) % 1000, Distillation()
    if teacher is not None and hasattr(net, "set_distilled_training"):
        net.set_distilled_training(enable=True)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True, capturable=images.is_cuda)

    def run() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = net(images)
            followed = None if teacher is None else teacher(images)
            loss = (
                F.cross_entropy(logits, target)
                if teacher is None
                else distillation(StepContext(logits, target, followed, net))
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def saved_bytes(net: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of the storages that autograd is handed for backward in a step, each once; parameters and views of them left out."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storage.nbytes() for storage in kept.values())
