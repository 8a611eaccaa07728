"""What kurtosis regularization and the tracking of oscillation add to a training step of a 2-bit DeiT-T with QKR: bytes, operations, time.

Run by `make extras-cost`. Bytes and operations are counted: tensors of more than a thousand values that torch's operations read and write
(what a C++ kernel does is not among them). Times are medians in CPU seconds of the process, one thread, all arms taking turns; the share of
a step is the median over the rounds. "alone" is the work of an extra without a step: it is less than what two steps differ by.
"""

from __future__ import annotations

import argparse
import statistics
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import step_arms
from benchmarks.kure_cost import Traffic, alone, count
from benchmarks.kure_cost import step as step_with
from benchmarks.step_arms import ARMS, Step
from qat.callbacks.oscillation import Oscillation
from qat.losses import Kure
from qat.model.sites import iter_quantizers

STORED = 3  # bytes that oscillation keeps of a weight between looks


def look(net: nn.Module) -> Step:
    """A look of the tracker at the weights of a net, as in front of an optimizer step."""
    tracker = Oscillation()
    trainer: Any = SimpleNamespace(global_step=0, log_every_n_steps=0)
    module: Any = SimpleNamespace(net=net)
    optimizer: Any = None
    tracker.setup(trainer, module, "fit")

    def run() -> None:
        tracker.on_before_optimizer_step(trainer, module, optimizer)

    return run


def one_after_the_other(*steps: Step) -> Step:
    """All in one."""

    def run() -> None:
        for one in steps:
            one()

    return run


def traffic_of_look(net: nn.Module, run: Step) -> tuple[Traffic, int]:
    """What the second look at a net moves, and the number of weights it looks at."""
    run()
    traffic = Traffic()
    with traffic:
        run()
    return traffic, sum(site.latent().numel() for site in iter_quantizers(net) if site.is_weight and site.quantizer.spec.bits <= 4)


def counted(name: str, traffic: Traffic, weights: int) -> list[str]:
    """Row of what was counted."""
    return [name, f"{weights}", f"{traffic.bytes / weights:.0f}", f"{traffic.operations / weights:.1f}", f"{traffic.kernels}"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2, choices=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = step_arms.random_batch(args.batch)
    nets = [step_arms.build(args.model, batch[0], ARMS["ofq"], args.bits) for _ in range(3)]
    looks = look(nets[1])
    rows = [counted("kure", *count(nets[0], Kure())), counted("oscillation", *traffic_of_look(nets[1], looks))]
    print(f"{step_arms.environment()}\n{args.model}, batch {args.batch}, W{args.bits}A{args.bits}, {args.rounds} rounds\n")
    print(step_arms.table(["extra", "weights", "bytes a weight", "operations a weight", "kernels"], rows))
    print(f"\noscillation keeps {STORED} bytes a weight, kure none\n", flush=True)
    arms = {"step": step_arms.step(nets[2], batch), "kure alone": alone(nets[0], Kure()), "oscillation alone": looks}
    arms["step, kure, oscillation"] = one_after_the_other(step_with(nets[0], Kure(), batch), looks)
    timings = step_arms.take_turns(arms, args.rounds, warmup=2)
    shares = {name: step_arms.ratio(timing, timings["step"]) for name, timing in timings.items()}
    times = [[name, f"{1000 * statistics.median(timings[name].cpu):.1f}", f"{100 * share.cpu:.1f}"] for name, share in shares.items()]
    print(step_arms.table(["arm", "ms", "% of a step"], times))


if __name__ == "__main__":
    main()
