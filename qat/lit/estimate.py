"""What a run will cost, measured on a few images before it begins."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.lit.module import QATModule

Autocast = Callable[[], AbstractContextManager]

PROBE_IMAGES = 8
QUICK_S = 0.2  # below it a probe of few images says more about overheads than about the net
REPEATS = 2
# Copies of the weights beside the weights themselves: gradients, and what the optimizer keeps.
COPIES = {"sgd": 2}
ADAM_COPIES = 3


@dataclass(frozen=True)
class StepCost:
    """Cost of one training step without its optimizer, and of evaluation.

    Attributes:
        train_s: seconds an image, forward and backward, the teacher included.
        eval_s: seconds an image, forward alone.
        saved_bytes: bytes an image that the forward pass keeps for the backward pass.
        weight_bytes: bytes of the weights, the teacher's included, of their gradients and of the optimizer's state.
    """

    train_s: float
    eval_s: float
    saved_bytes: float
    weight_bytes: int


def measure_step(
    module: QATModule,
    input_size: tuple[int, int, int],
    *,
    batch_size: int,
    num_classes: int,
    device: torch.device,
    autocast: Autocast = contextlib.nullcontext,
    opt: str = "adamw",
) -> StepCost:
    """Run a few steps on random images; weights, gradients, buffers and random generators are afterwards what they were.

    Args:
        module: on `device`, as does its teacher.
        input_size: (channels, height, width).
        batch_size: images of a step; a slow device is asked with fewer.
        num_classes: number of classes.
        device: where the run will be.
        autocast: what the forward pass runs under.
        opt: the optimizer's name.
    """
    few = min(batch_size, PROBE_IMAGES)
    buffers = [buffer.clone() for buffer in module.buffers()]
    was_training = module.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            module.train()
            step = _step(module, _random_batch(few, input_size, num_classes, device), autocast)
            saved = _saved_bytes(step, module) / few
            seconds = _seconds(step, device)
            if seconds < QUICK_S and few < batch_size:
                few = batch_size
                seconds = _seconds(_step(module, _random_batch(few, input_size, num_classes, device), autocast), device)
            module.eval()
            eval_seconds = _seconds(_evaluation(module, _random_batch(few, input_size, num_classes, device), autocast), device)
        finally:
            module.train(was_training)
            module.zero_grad(set_to_none=True)
            for buffer, value in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(value)
    return StepCost(seconds / few, eval_seconds / few, saved, _weight_bytes(module, opt))


def _random_batch(batch: int, input_size: tuple[int, int, int], num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *input_size, device=device), torch.arange(batch, device=device) % num_classes


def _step(module: QATModule, batch: tuple[Tensor, Tensor], autocast: Autocast) -> Callable[[], None]:
    def step() -> None:
        with autocast():
            total, _ = module.loss(module.context(batch))
        total.backward()

    return step


def _evaluation(module: QATModule, batch: tuple[Tensor, Tensor], autocast: Autocast) -> Callable[[], None]:
    def evaluation() -> None:
        with torch.no_grad(), autocast():
            module.net(batch[0])

    return evaluation


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few runs, behind one that warms up."""
    best = float("inf")
    for turn in range(1 + REPEATS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began) if turn else best
    return best


def _saved_bytes(step: Callable[[], object], module: QATModule) -> int:
    """Bytes of all storages that a step keeps for its backward pass, the weights' own left out."""
    kept = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def _weight_bytes(module: QATModule, opt: str) -> int:
    own = sum(p.numel() * p.element_size() for p in module.parameters())
    teacher = 0 if module.teacher is None else sum(p.numel() * p.element_size() for p in module.teacher.net.parameters())
    return own * (1 + COPIES.get(opt, ADAM_COPIES)) + teacher
