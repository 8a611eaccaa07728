"""What may be added to a training step of a 2-bit DeiT-T with QKR, and what it costs: time, and bytes kept for the backward pass.

Run by `make extras-cost`: kurtosis regularization, the gradient's L1 norm and the tracking of oscillation, in steps of cross entropy; the
blocks of a teacher, in steps that follow its logits. One thread, all arms taking turns, CPU seconds of the process; the ratio is the median
of the rounds. "alone" is an extra without a step, which is less than what two steps differ by.
"""

from __future__ import annotations

import argparse
import statistics
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import step_arms, timing
from benchmarks.step_arms import ARMS, FLOAT, MIB, Batch, saved_bytes
from benchmarks.timing import Step, ratio
from qat.callbacks.oscillation import Oscillation
from qat.lit import QATModule, Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, FeatureDistillation, Kure, LossTerm, StepContext

PLAIN, FOLLOWS = "cross entropy", "teacher's logits"


def step(net: nn.Module, batch: Batch, terms: dict[str, LossTerm], teacher: nn.Module | None = None) -> Step:
    """Teacher, forward, loss, backward, AdamW."""
    loss = CompositeLoss(terms)
    loss.prepare(net)
    module = QATModule(net, loss, num_classes=1000, teacher=None if teacher is None else Teacher(teacher)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def run() -> None:
        total, _ = module.loss(module.context(batch))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def kure_alone(net: nn.Module) -> Step:
    """Value and gradient of the term on weights."""
    term = Kure()
    term.prepare(net)
    context = StepContext(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, net)

    def run() -> None:
        term(context).backward()
        net.zero_grad()

    return run


def tracking_alone(net: nn.Module) -> Step:
    """The tracker's evaluation of the weights of a net, as in front of an optimizer step."""
    tracker, optimizer = Oscillation(), None
    trainer: Any = SimpleNamespace(global_step=0, log_every_n_steps=0)
    module: Any = SimpleNamespace(net=net)
    tracker.setup(trainer, module, "fit")
    return lambda: tracker.on_before_optimizer_step(trainer, module, optimizer)  # type: ignore[arg-type]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=step_arms.MODEL)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2, choices=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = step_arms.random_batch(args.batch)
    teacher = step_arms.build(args.model, batch[0], ARMS[FLOAT], 32)
    losses: dict[str, dict[str, LossTerm]] = {PLAIN: {"ce": CrossEntropy()}, FOLLOWS: {"kd": Distillation()}}
    losses |= {"with KURE": losses[PLAIN] | {"kure": Kure()}}
    losses |= {f"with its blocks, {one}": losses[FOLLOWS] | {"blocks": FeatureDistillation(40.0, one)} for one in ("last", "all")}
    nets = {name: step_arms.build(args.model, batch[0], ARMS["ofq"], args.bits) for name in (*losses, "KURE alone", "tracking alone")}
    steps = {name: step(nets[name], batch, terms, teacher if "kd" in terms else None) for name, terms in losses.items()}
    steps |= {"KURE alone": kure_alone(nets["KURE alone"]), "tracking alone": tracking_alone(nets["tracking alone"])}
    timings = timing.take_turns(steps, args.rounds)
    print(f"{timing.environment()}\n{args.model}, batch {args.batch}, W{args.bits}A{args.bits}, {args.rounds} rounds\n")
    rows = []
    for name, one in timings.items():
        base = FOLLOWS if "kd" in losses.get(name, {}) else PLAIN
        kept = saved_bytes(nets[name], steps[name]) / MIB
        rows.append([name, f"{1000 * statistics.median(one.cpu):.0f}", base, f"{ratio(one, timings[base])}", f"{kept:.0f}"])
    print(timing.table(["arm", "ms", "in steps of", "CPU [range], wall", "MiB kept"], rows))


if __name__ == "__main__":
    main()
