"""Training steps that the benchmarks of time and memory share: the arms, their nets, their steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import qat
from evidence.timing import Step
from qat.lit.teacher import Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, StepContext

Batch = tuple[Tensor, Tensor]
SIZE = (3, 224, 224)
MODEL = "deit_tiny_patch16_224"
FLOAT = "float"
MIB = 2**20


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


def random_batch(size: int) -> Batch:
    """Images and classes."""
    torch.manual_seed(0)
    return torch.randn(size, *SIZE), torch.arange(size)


def build(model: str, images: Tensor, arm: Arm, bits: int) -> nn.Module:
    """A net with random weights; converted, scales from the images, unless it is the float net."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=1000)
    if arm.knobs is not None:
        qat.initialize_scales(qat.convert(net, qat.recipe(arm.recipe, bits=bits, **arm.knobs), input_size=SIZE), [images])
        qat.set_execution(net, memory=arm.memory)
    return net.train()


def teacher_of(model: str, images: Tensor, arm: Arm) -> Teacher | None:
    """The float net whose logits the step follows, if it follows one."""
    return Teacher(build(model, images, ARMS[FLOAT], 32)) if arm.teacher else None


def step(net: nn.Module, batch: Batch, teacher: Callable[[Tensor], Tensor] | None = None) -> Step:
    """One training step: forward, loss, backward, AdamW. Gradients are freed behind it, as their memory is at the next step."""
    loss = CompositeLoss({"ce": CrossEntropy()} if teacher is None else {"kd": Distillation()})
    if teacher is not None and hasattr(net, "set_distilled_training"):
        net.set_distilled_training(enable=True)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        images, target = batch
        total, _ = loss(StepContext(net(images), target, None if teacher is None else teacher(images), net))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def saved_bytes(net: nn.Module, run: Step) -> int:
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
