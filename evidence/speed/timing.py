"""Steps that take turns, ratios within a round, tables, and what it all ran on."""

from __future__ import annotations

import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch

Step = Callable[[], object]


@dataclass
class Timing:
    """Seconds of a step, of the process and by the clock."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def machine() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def environment() -> str:
    """Processor, threads, versions and load."""
    versions = (
        f"torch {torch.__version__}, timm {timm.__version__}, Python {sys.version.split()[0]}"
    )
    return f"{machine()}, {torch.get_num_threads()} thread(s), {versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def timed(step: Step) -> tuple[float, float]:
    """Seconds of one call, of the process and by the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def take_turns(steps: Mapping[str, Step], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run one step of each in every round, in an order drawn anew; warm-up rounds are not among the timings."""
    timings = {name: Timing() for name in steps}
    for turn in range(-warmup, rounds):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            cpu, wall = timed(steps[name])
            if turn >= 0:
                timings[name].cpu.append(cpu)
                timings[name].wall.append(wall)
    return timings


def ratio(timing: Timing, base: Timing) -> str:
    """A step in steps of the base, round by round: median, lowest and highest in CPU seconds, then the median by the clock."""
    cpu, wall = (
        [a / b for a, b in zip(*both, strict=True)]
        for both in ((timing.cpu, base.cpu), (timing.wall, base.wall))
    )
    return f"{statistics.median(cpu):.2f} [{min(cpu):.2f}, {max(cpu):.2f}], {statistics.median(wall):.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; a cell may hold any text."""
    escaped = [
        [" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in (head, *rows)
    ]
    lines = [f"| {' | '.join(line)} |" for line in escaped]
    return re.sub(r"\|  (?=\|)", "| ", "\n".join((lines[0], f"|{'---|' * len(head)}", *lines[1:])))
