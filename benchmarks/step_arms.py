"""Training steps that the benchmarks of time and memory share: the arms, their nets, and turns that a busy machine slows alike."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

import qat
from benchmarks.kure_cost import SIZE, machine
from qat.lit.teacher import Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, StepContext

Batch = tuple[Tensor, Tensor]
Step = Callable[[], None]
FLOAT = "float"
MEMORIES = ("save", "recompute")


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


@dataclass
class Timing:
    """Seconds of the steps of an arm: of the process, of the clock, and by the clock those of the first step, which sets everything up."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    first: float = 0.0


@dataclass
class Ratio:
    """Median, lowest and highest ratio within a round, in CPU seconds; the median by the clock."""

    cpu: float
    low: float
    high: float
    wall: float

    def __str__(self) -> str:
        return f"{self.cpu:.2f} [{self.low:.2f}, {self.high:.2f}], {self.wall:.2f}"


def environment() -> str:
    """Processor, threads and versions."""
    versions = f"timm {timm.__version__}, Python {sys.version.split()[0]}"
    return f"{machine()}, {versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def random_batch(size: int) -> Batch:
    """Images and classes."""
    torch.manual_seed(0)
    return torch.randn(size, *SIZE), torch.arange(size)


def has_memory_modes() -> bool:
    """True if nets can be told what to keep for backward."""
    return "set_execution" in qat.__all__


def build(model: str, images: Tensor, arm: Arm, bits: int, memory: str = "save") -> nn.Module:
    """A net with random weights; converted, scales from the images, unless it is the float net."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=1000)
    if arm.knobs is not None:
        qat.initialize_scales(qat.convert(net, qat.recipe("ofq", bits=bits, **arm.knobs), input_size=SIZE), [images])
        if memory != "save":
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


def take_turns(steps: dict[str, Step], rounds: int, warmup: int) -> dict[str, Timing]:
    """Run one step of each in every round, in an order drawn anew; warm-up rounds are not among the timings."""
    timings = {name: Timing() for name in steps}
    for turn in range(-warmup, rounds):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            timing, cpu, wall = timings[name], time.process_time(), time.perf_counter()
            steps[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            timing.first = wall if turn == -warmup else timing.first
            if turn >= 0:
                timing.cpu.append(cpu)
                timing.wall.append(wall)
    return timings


def ratio(timing: Timing, base: Timing) -> Ratio:
    """A step in steps of the base, round by round."""
    cpu = [one / other for one, other in zip(timing.cpu, base.cpu, strict=True)]
    wall = [one / other for one, other in zip(timing.wall, base.wall, strict=True)]
    return Ratio(statistics.median(cpu), min(cpu), max(cpu), statistics.median(wall))


@contextmanager
def aggressive_recomputation() -> Generator[None]:
    """Let torch.compile compute again in backward what is cheap; the setting has no public name."""
    if not hasattr(functorch_config, "aggressive_recomputation"):
        raise SystemExit(f"torch {torch.__version__} has no aggressive_recomputation")
    with functorch_config.patch(aggressive_recomputation=True):
        yield


def graphs() -> tuple[int, int]:
    """How many graphs were compiled in this process, and how many breaks there were in them."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def check_graphs(nets: int) -> None:
    """End the process unless there is one graph for each net: another one is a break, or a second compilation of the same net."""
    found, breaks = graphs()
    if (found, breaks) != (nets, 0):
        raise SystemExit(f"{found} graphs and {breaks} breaks for {nets} compiled nets")


def in_a_process(script: str, *arguments: object, **variables: str) -> dict[str, Any] | None:
    """What a fresh process of a benchmark found: the last line it prints, as JSON. None if it failed; its complaint is on stderr.

    The compiler's caches are its own and empty, so that the first step takes what it takes on a new machine.

    Args:
        script: the benchmark.
        arguments: its options.
        variables: of the environment.
    """
    command = [sys.executable, script, *map(str, arguments)]
    print("+", *command[1:], file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, **variables}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Keep all figures, with what they were measured on."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
