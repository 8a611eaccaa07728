"""Time of a quantized training step in float steps of the same net: forward, loss, backward and AdamW, eager.

Run by `make step-time`. All arms are in one process and take turns, one step a round in an order drawn anew; a ratio is the median over the
rounds of arm / float in the same round, in CPU seconds of the process, so that a busy machine slows both alike. The lowest and the highest
ratio stand behind it. One thread; random weights; scales from the batch.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import qat
from benchmarks.kure_cost import machine
from qat.lit.teacher import Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, StepContext

SIZE = (3, 224, 224)
ARMS = {
    "linears": {"attention": "float"},
    "ofq without qkr": {"attention": "standard"},
    "ofq": {},
    "ofq + teacher": {},
}


def build(model: str, images: Tensor, knobs: dict[str, str] | None, bits: int) -> nn.Module:
    """A net with random weights, converted if there are knobs."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=1000)
    if knobs is not None:
        qat.initialize_scales(qat.convert(net, qat.recipe("ofq", bits=bits, **knobs), input_size=SIZE), [images])
    return net.train()


def step(net: nn.Module, batch: tuple[Tensor, Tensor], teacher: Teacher | None) -> Callable[[], None]:
    """One training step with AdamW."""
    loss = CompositeLoss({"ce": CrossEntropy()} if teacher is None else {"kd": Distillation()})
    if teacher is not None and hasattr(net, "set_distilled_training"):
        net.set_distilled_training(enable=True)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def run() -> None:
        images, target = batch
        total, _ = loss(StepContext(net(images), target, None if teacher is None else teacher(images), net))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return run


def main() -> None:
    """Print a line for each arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, batch {args.batch}, W{args.bits}A{args.bits}")
    for model in args.models:
        batch = torch.randn(args.batch, *SIZE), torch.arange(args.batch)
        teacher = Teacher(build(model, batch[0], None, args.bits))
        steps = {"float": step(build(model, batch[0], None, args.bits), batch, None)}
        for name, knobs in ARMS.items():
            steps[name] = step(build(model, batch[0], knobs, args.bits), batch, teacher if "teacher" in name else None)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(args.rounds + 1):
            for name in random.Random(turn).sample(list(steps), len(steps)):
                began = time.process_time()
                steps[name]()
                seconds[name] += [time.process_time() - began] if turn else []
        print(f"{model}: float step {1000 * statistics.median(seconds['float']):.0f} ms")
        for name in ARMS:
            ratios = [one / base for one, base in zip(seconds[name], seconds["float"], strict=True)]
            print(f"  {name:16} {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]", flush=True)


if __name__ == "__main__":
    main()
