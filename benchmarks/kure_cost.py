"""What kurtosis regularization and the gradient-L1 term cost: share of a DeiT-T training step, bytes moved, operations.

Run by `make kure-cost`. Steps of all arms take turns, so that a busy machine slows them alike; times are CPU seconds of this process, and
medians are printed. "kure" is the value and gradient of the term by itself: its share of a step is below what two steps differ by.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qat
from qat.losses import CompositeLoss, CrossEntropy, GradL1, Kure, LossTerm, StepContext

SIZE = (3, 224, 224)
VIEWS = ("view", "detach", "unbind", "split", "t.default", "transpose", "expand", "unsqueeze", "slice", "select", "alias", "as_strided")


def machine() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return f"{names[0] if names else platform.processor()}, torch {torch.__version__}, one thread"


class Traffic(TorchDispatchMode):
    """Counts what operations read and write in tensors of more than a thousand values, and how many values they work on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations, self.kernels = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in VIEWS):
            return out
        read = [a for a in args if isinstance(a, Tensor) and a.numel() > 1000]
        written = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor) and o.numel() > 1000]
        self.bytes += sum(t.numel() * t.element_size() for t in read + written)
        self.operations += max((t.numel() for t in read + written), default=0)
        self.kernels += 1
        return out


def step(net: nn.Module, term: LossTerm | None, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One training step with AdamW."""
    loss = CompositeLoss({"ce": CrossEntropy()} | ({} if term is None else {"term": term}))
    loss.prepare(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def run() -> None:
        images, target = batch
        total, _ = loss(StepContext(net(images), target, None, net))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return run


def build(recipe: str, batch: tuple[Tensor, Tensor]) -> nn.Module:
    """DeiT-T with random weights, scales from the batch."""
    torch.manual_seed(0)
    net = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
    if recipe != "fp":
        qat.initialize_scales(qat.convert(net, qat.recipe(recipe, bits=2), input_size=SIZE), [batch[0]])
    return net.train()


def plain_kurtosis(step: StepContext, term: Kure) -> Tensor:
    """The same value, written as the formula."""
    weights = [latent.of(step.net) for latent in term.latents]
    return torch.stack([((((w - w.mean()) / w.std()) ** 4).mean() - 1.8) ** 2 for w in weights]).mean()


class PlainKure(Kure):
    """The formula, differentiated by autograd."""

    def forward(self, step: StepContext) -> Tensor:
        """Scalar."""
        return plain_kurtosis(step, self)


def count(net: nn.Module, term: LossTerm) -> tuple[Traffic, int]:
    """Traffic of the term alone, forward and backward, and the number of weights it acts on."""
    term.prepare(net)
    context = StepContext(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, net)
    traffic = Traffic()
    with traffic:
        term(context).backward()
    net.zero_grad(set_to_none=True)
    assert isinstance(term, Kure)  # noqa: S101  (narrows a type)
    return traffic, sum(latent.of(net).numel() for latent in term.latents)


def alone(net: nn.Module, term: LossTerm) -> Callable[[], None]:
    """Value and gradient of a term on weights, without a step."""
    term.prepare(net)
    context = StepContext(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, net)

    def run() -> None:
        net.zero_grad()
        term(context).backward()

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = torch.randn(args.batch, *SIZE), torch.arange(args.batch)
    print(f"DeiT-T, batch {args.batch}, 224 px; {machine()}")
    for name, term in (("kure", Kure()), ("kure, autograd's", PlainKure())):
        traffic, n = count(build("fp", batch), term)
        each = f"{traffic.bytes / n:.0f} bytes, {traffic.operations / n:.1f} operations a weight"
        print(f"{name:18} {n} weights: {each}; {traffic.kernels} kernels")
    for recipe in ("fp", "ofq"):
        arms = {
            "step": step(build(recipe, batch), None, batch),
            "step with kure": step(build(recipe, batch), Kure(), batch),
            "step with grad_l1": step(build(recipe, batch), GradL1(), batch),
            "kure": alone(build(recipe, batch), Kure()),
            "kure, autograd's": alone(build(recipe, batch), PlainKure()),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(args.rounds + 1):
            for name, run in arms.items():
                began = time.process_time()
                run()
                seconds[name] += [time.process_time() - began] if turn else []
        for name, values in seconds.items():
            share = statistics.median([value / base for value, base in zip(values, seconds["step"], strict=True)])
            print(f"{recipe:4} {name:18} {1000 * statistics.median(values):7.1f} ms, {100 * share:6.1f} % of a step", flush=True)


if __name__ == "__main__":
    main()
