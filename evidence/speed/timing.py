"""Timing of steps in turns, ratios within a round, tables, and the machine in words."""

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
VECTOR_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


@dataclass
class Timing:
    """Seconds of a step in each round: CPU time of the process, and wall time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def machine() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def processor_type() -> str:
    """Vendor, family, model and vector instructions of the processor, then its name.

    The name "AMD EPYC" stands for processors with and without AVX-512, which round differently.
    """
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return machine()
    facts: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    vendor = facts.get("vendor_id", platform.machine())
    family = facts.get("cpu family", "unknown")
    model = facts.get("model", "unknown")
    flags = facts.get("flags", "").split()
    vectors = " ".join(name for name in VECTOR_INSTRUCTIONS if name in flags)
    return f"{vendor} family {family} model {model} {vectors} ({machine()})"


def environment() -> str:
    """Processor, threads, versions and load."""
    python = sys.version.split()[0]
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {python}"
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return f"{machine()}, {torch.get_num_threads()} thread(s), {versions}; {load}"


def timed(step: Step) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    cpu_start = time.process_time()
    wall_start = time.perf_counter()
    step()
    return time.process_time() - cpu_start, time.perf_counter() - wall_start


def take_turns(steps: Mapping[str, Step], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run each step once a round, in random order; warm-up rounds are not timed."""
    timings = {name: Timing() for name in steps}
    for turn in range(-warmup, rounds):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            cpu, wall = timed(steps[name])
            if turn >= 0:
                timings[name].cpu.append(cpu)
                timings[name].wall.append(wall)
    return timings


def ratio(timing: Timing, base: Timing) -> str:
    """Time of a step relative to the base, round by round.

    Returns:
        Median, lowest and highest ratio of CPU time, then the median ratio of wall time.
    """
    cpu = [a / b for a, b in zip(timing.cpu, base.cpu, strict=True)]
    wall = [a / b for a, b in zip(timing.wall, base.wall, strict=True)]
    cpu_range = f"[{min(cpu):.2f}, {max(cpu):.2f}]"
    return f"{statistics.median(cpu):.2f} {cpu_range}, {statistics.median(wall):.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells may contain any text."""
    lines = [_table_line(cells) for cells in (head, *rows)]
    text = "\n".join((lines[0], f"|{'---|' * len(head)}", *lines[1:]))
    return re.sub(r"\|  (?=\|)", "| ", text)  # one space in an empty cell


def _table_line(cells: Sequence[str]) -> str:
    escaped = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
