"""What all benchmarks share: steps that take turns, ratios within a round, fresh processes, tables, and what they ran on."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

Step = Callable[[], object]


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


def machine() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment() -> str:
    """Processor, threads, versions and load."""
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {sys.version.split()[0]}"
    return f"{machine()}, {torch.get_num_threads()} thread(s), {versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def timed(step: Step) -> tuple[float, float]:
    """Seconds of one call, of the process and of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def take_turns(steps: Mapping[str, Step], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run one step of each in every round, in an order drawn anew; warm-up rounds are not among the timings."""
    timings = {name: Timing() for name in steps}
    for turn in range(-warmup, rounds):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            cpu, wall = timed(steps[name])
            if turn == -warmup:
                timings[name].first = wall
            if turn >= 0:
                timings[name].cpu.append(cpu)
                timings[name].wall.append(wall)
    return timings


def ratio(timing: Timing, base: Timing) -> Ratio:
    """A step in steps of the base, round by round."""
    cpu = [one / other for one, other in zip(timing.cpu, base.cpu, strict=True)]
    wall = [one / other for one, other in zip(timing.wall, base.wall, strict=True)]
    return Ratio(statistics.median(cpu), min(cpu), max(cpu), statistics.median(wall))


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
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, **variables}
        )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Keep all figures, with what they were measured on."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
