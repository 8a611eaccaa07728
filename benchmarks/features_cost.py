"""What following a teacher's blocks adds to a training step of a 2-bit DeiT-T with QKR that follows its logits: time, and bytes kept.

Run by `make features-cost`. Times are medians in CPU seconds of the process, one thread, all arms taking turns; the ratio is the median of
the rounds, lowest and highest behind it. Kept: bytes that autograd is handed for backward, each storage once, parameters left out.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

from benchmarks import step_arms
from benchmarks.memory import MIB, saved_bytes
from benchmarks.step_arms import ARMS, FLOAT, Batch, Step
from qat.lit import QATModule, Teacher
from qat.losses import CompositeLoss, Distillation, FeatureDistillation

BASE = "logits alone"


def step(net: nn.Module, batch: Batch, teacher: nn.Module, blocks: str | None) -> Step:
    """Teacher, forward, loss, backward, AdamW."""
    terms = {"kd": Distillation()} | ({} if blocks is None else {"features": FeatureDistillation(40.0, blocks)})
    module = QATModule(net, CompositeLoss(terms), num_classes=1000, teacher=Teacher(teacher)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def run() -> None:
        total, _ = module.loss(module.context(batch))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = step_arms.random_batch(args.batch)
    nets = {name: step_arms.build(args.model, batch[0], ARMS["ofq"], args.bits) for name in (BASE, "blocks: last", "blocks: all")}
    steps = {
        name: step(net, batch, step_arms.build(args.model, batch[0], ARMS[FLOAT], 32), name.partition(": ")[2] or None)
        for name, net in nets.items()
    }
    timings = step_arms.take_turns(steps, args.rounds, warmup=2)
    print(f"{step_arms.environment()}\n{args.model}, batch {args.batch}, W{args.bits}A{args.bits}, {args.rounds} rounds\n")
    rows = []
    for name, timing in timings.items():
        share = step_arms.ratio(timing, timings[BASE])
        kept = saved_bytes(nets[name], steps[name]) / MIB
        rows.append([
            name,
            f"{1000 * statistics.median(timing.cpu):.1f}",
            f"{share.cpu:.3f} [{share.low:.3f}, {share.high:.3f}]",
            f"{kept:.1f}",
        ])
    print(step_arms.table(["follows", "ms", "of a step that follows logits", "MiB kept"], rows))


if __name__ == "__main__":
    main()
