"""Training steps that the benchmarks of time and memory share: the arms, their nets, their steps."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

import qat
from benchmarks.timing import Step
from qat.lit.teacher import Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, StepContext

Batch = tuple[Tensor, Tensor]
SIZE = (3, 224, 224)
MODEL = "deit_tiny_patch16_224"
FLOAT = "float"
COMPILED_FLOAT = "compiled float"


@dataclass(frozen=True)
class Arm:
    """A net and its step: settings of the recipe `ofq` (None: the float net), and whether a float teacher's forward pass is part of it."""

    knobs: dict[str, str] | None
    teacher: bool = False


ARMS = {
    FLOAT: Arm(None),
    "linears": Arm({"attention": "float"}),
    "ofq without qkr": Arm({"attention": "standard"}),
    "ofq": Arm({}),
    "ofq + teacher": Arm({}, teacher=True),
}
# Arms with attention in them; the others keep nothing that could be computed again.
RECOMPUTED = ("ofq without qkr", "ofq")


def random_batch(size: int) -> Batch:
    """Images and classes."""
    torch.manual_seed(0)
    return torch.randn(size, *SIZE), torch.arange(size)


def build(model: str, images: Tensor, arm: Arm, bits: int, memory: str = "save") -> nn.Module:
    """A net with random weights; converted, scales from the images, unless it is the float net."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=1000)
    if arm.knobs is not None:
        qat.initialize_scales(qat.convert(net, qat.recipe("ofq", bits=bits, **arm.knobs), input_size=SIZE), [images])
        qat.set_execution(net, memory=memory)
    return net.train()


def teacher_of(model: str, images: Tensor, arm: Arm) -> Teacher | None:
    """The float net whose logits the step follows, if it follows one."""
    return Teacher(build(model, images, ARMS[FLOAT], 32)) if arm.teacher else None


def step(net: nn.Module, batch: Batch, teacher: Callable[[Tensor], Tensor] | None = None) -> Step:
    """One training step: forward, loss, backward, AdamW. Gradients are freed behind it, as their memory is at the next step."""
    loss = CompositeLoss({"ce": CrossEntropy()} if teacher is None else {"kd": Distillation()})
    if teacher is not None and hasattr(net, "set_distilled_training"):
        net.set_distilled_training(enable=True)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def run() -> None:
        images, target = batch
        total, _ = loss(StepContext(net(images), target, None if teacher is None else teacher(images), net))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@contextmanager
def aggressive_recomputation() -> Generator[None]:
    """Let torch.compile compute again in backward what is cheap; the setting has no public name."""
    with functorch_config.patch(aggressive_recomputation=True):
        yield


def graphs() -> tuple[int, int]:
    """How many graphs were compiled in this process, and how many breaks there were in them."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def check_graphs(nets: int) -> None:
    """End the process unless there is one graph for each net: another one is a break, or a second compilation of the same net."""
    if graphs() != (nets, 0):
        raise SystemExit(f"{graphs()} graphs and breaks for {nets} compiled nets")
