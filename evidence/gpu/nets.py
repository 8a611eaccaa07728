"""Nets and training steps that are checked and timed: random weights, random images on the device."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import qat
from evidence.step_arms import ARMS
from qat.lit.teacher import Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, StepContext

BITS, CALIBRATION = 2, 8
TINY = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}
# The student of an arm, its teacher's data type beside autocast's, and the settings of its recipe are in `ARMS`.
BF16_TEACHER = "ofq + bf16 teacher"
ARM_NAMES = (*ARMS, BF16_TEACHER)
Step = Callable[[], Tensor]


def images_of(batch: int, device: torch.device, *, tiny: bool) -> Tensor:
    """(B, 3, H, W)."""
    size = TINY["img_size"] if tiny else 224
    return torch.randn(batch, 3, size, size, device=device)


def build(model: str, arm: str, images: Tensor, *, tiny: bool, bits: int = BITS, **sizes: int) -> nn.Module:
    """A net where the images are, converted unless it is the float net; an arm with a teacher has the student of the one without."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=1000, **(TINY if tiny else {}), **sizes).to(images.device)
    knobs = ARMS[arm.partition(" + ")[0]].knobs
    if knobs is not None:
        recipe = qat.recipe("ofq", bits=bits, **knobs)
        qat.initialize_scales(qat.convert(net, recipe, input_size=images.shape[1:]), [images[:CALIBRATION]])
    return net.train()


def teacher_of(model: str, arm: str, images: Tensor, *, compiled: bool, tiny: bool) -> Callable[[Tensor], Tensor] | None:
    """The float net that an arm follows; None if it follows none."""
    if " + " not in arm:
        return None
    net = build(model, "float", images, tiny=tiny)
    teacher = Teacher(net.bfloat16() if arm == BF16_TEACHER else net)
    if compiled and not tiny:
        teacher.compile()
    return (lambda x: teacher(x.bfloat16())) if arm == BF16_TEACHER else teacher


def training_step(net: nn.Module, images: Tensor, teacher: Callable[[Tensor], Tensor] | None) -> Step:
    """Forward in bfloat16 autocast, loss, backward and fused AdamW; gives the loss. A CUDA graph can hold all of it."""
    device = images.device
    target = torch.arange(len(images), device=device) % 1000
    loss = CompositeLoss({"ce": CrossEntropy()} if teacher is None else {"kd": Distillation()})
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True, capturable=device.type == "cuda")

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            total, _ = loss(StepContext(net(images), target, None if teacher is None else teacher(images), net))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()  # as in a run, gradients take no memory between steps
        return total.detach()

    return run
