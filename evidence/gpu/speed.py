"""Time training steps in bfloat16 autocast, by model, batch, arm and mode.

Each variant has its own process. The processes of a group compile at the same time, then take turns
of a few steps. In each round, every variant has one turn, in random order, so that a variant and
the float model are timed at nearly the same time.
"""

from __future__ import annotations

import argparse
import collections
import cProfile
import gc
import json
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evidence.gpu.rows import LATE, Row, Worker, append, end_all, read, result_of
from evidence.speed.steps import ARMS, FLOAT, TINY, build, teacher_of, training_step
from evidence.speed.timing import table
from qat import kernels
from qat.lit.compiled import compile_in_place

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
# Number of steps before a CUDA graph is captured, of rounds, and of steps per turn.
WARM_UP = 3
ROUNDS = 7
STEPS = 3
# Batches and modes, the most important first.
ORDER = (
    (256, "compiled"),
    (256, "graphs"),
    (256, "eager"),
    (256, "compiled + graph"),
    (64, "compiled"),
    (64, "eager"),
    (64, "compiled + graph"),
)
DRY_ORDER = ((2, "compiled"), (2, "eager"))
# Seconds for the first steps of a group, and for a turn.
PREPARATION = 200.0
TURN = 60.0
# A group starts only if this many seconds are left; the last rounds may use the reserve.
NEEDED = 60.0
RESERVE = 60.0
GIB = 2**30
# Number of kernels and of host functions in a profile.
LONGEST = 40
HEAD = [
    "arm",
    "mode",
    "ms",
    "x float, same mode",
    "x float, compiled",
    "images/s",
    "host ms",
    "device busy",
    "kernels",
    "GiB",
    "x float",
]
# In the process of a variant: its step.
_ready: dict[Variant, Callable[[], Any]] = {}


class Variant(NamedTuple):
    """A step that is timed.

    Attributes:
        model: timm name of the model.
        batch: number of images.
        arm: a key of `ARMS`.
        mode: `compiled`, `graphs` (as with `compile=graphs`), `compiled + graph` (in a CUDA graph
            that includes the optimizer), or `eager`.
    """

    model: str
    batch: int
    arm: str
    mode: str

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.model}, {self.batch}, {self.arm}, {self.mode}"


def groups(models: list[str], *, dry_run: bool) -> list[list[Variant]]:
    """Variants that are timed together, the most important groups first."""
    if dry_run:
        models = models[:1]
    result = []
    for batch, mode in DRY_ORDER if dry_run else ORDER:
        for model in models:
            result.append([Variant(model, batch, arm, mode) for arm in ARMS])
    return result


def prepare(variant: Variant, device: str) -> Row:
    """Build a variant and run its first step.

    If memory runs out, another call continues with what is already compiled.
    """
    _free_memory()
    is_dry_run = device == "cpu"
    # With "auto", a device on which kernels fail would be timed without kernels.
    needs_kernels = variant.mode == "eager" and variant.arm != FLOAT and not is_dry_run
    kernels.use("triton" if needs_kernels else "auto")
    start_time = time.monotonic()
    if variant not in _ready:
        _ready[variant] = _build_step(variant, device, is_dry_run=is_dry_run)
    loss = _ready[variant]().item()
    seconds = time.monotonic() - start_time
    if variant.mode.endswith("graph") and not is_dry_run:
        _ready[variant] = captured(_ready[variant])
    _free_memory()
    return {"first_s": seconds, "loss": loss}


def _build_step(variant: Variant, device: str, *, is_dry_run: bool) -> Callable[[], Any]:
    sizes: dict[str, Any] = TINY | {"depth": 1} if is_dry_run else {}
    side = sizes.get("img_size", 224)
    images = torch.randn(variant.batch, 3, side, side, device=device)
    arm = ARMS[variant.arm]
    net = build(variant.model, arm, images, **sizes)
    teacher = teacher_of(variant.model, arm, images, **sizes)
    uses_graphs = variant.mode == "graphs"
    if variant.mode != "eager" and not is_dry_run:
        compile_in_place(net, cuda_graphs=uses_graphs)
        if teacher is not None:
            teacher.compile(cuda_graphs=uses_graphs)
    step = training_step(net, images, teacher, half=True)
    if not uses_graphs:
        return step

    def marked_step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return marked_step


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """Capture a step and its optimizer as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return lambda: (graph.replay(), step)  # the reference keeps the step's tensors alive


def turn(variant: Variant, num_steps: int, device: str) -> Row:
    """Time a few steps, after an untimed step that allocates memory again.

    Returns:
        For one step: `ms` between events on the device; `host_ms`, an upper bound of the host's
        time (the host waits if the device is some thousand kernels behind); `peak`, bytes that the
        steps allocate in addition to existing tensors.
    """
    step = _ready[variant]
    step()
    if device == "cpu":
        start_time = time.perf_counter()
        step()
        ms = 1000 * (time.perf_counter() - start_time)
        return {"ms": ms, "host_ms": ms, "peak": 0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    bytes_before = torch.cuda.memory_allocated()
    start_time = time.perf_counter()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_steps):
        step()
    end.record()
    host_ms = 1000 * (time.perf_counter() - start_time) / num_steps
    end.synchronize()
    peak = torch.cuda.max_memory_allocated() - bytes_before
    _free_memory()
    return {"ms": start.elapsed_time(end) / num_steps, "host_ms": host_ms, "peak": peak}


def profile_step(variant: Variant, num_steps: int, device: str) -> Row:
    """Profile a step: busy milliseconds of the device, kernels, the longest kernels and calls."""
    if device == "cpu":
        return {}
    torch.cuda.synchronize()
    with cProfile.Profile() as host:
        for _ in range(num_steps):
            _ready[variant]()
    functions = pstats.Stats(host).get_stats_profile().func_profiles.items()
    longest = sorted(functions, key=lambda item: -item[1].tottime)[:LONGEST]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(num_steps):
            _ready[variant]()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        row = busy(json.loads(path.read_text())["traceEvents"], num_steps)
    row["host"] = []
    for name, profile_of_function in longest:
        milliseconds = 1000 * profile_of_function.tottime / num_steps
        row["host"].append((name, milliseconds, profile_of_function.ncalls))
    return row


def busy(events: list[dict[str, Any]], num_steps: int) -> Row:
    """Busy time of the device from the events of a trace (microseconds); overlaps count once."""
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    device_events = [event for event in events if event.get("cat") in kinds]
    total = 0.0
    last_end = float("-inf")
    longest = collections.Counter[str]()
    for event in sorted(device_events, key=lambda event: event["ts"]):
        longest[event["name"][:80]] += event["dur"] / 1000 / num_steps
        end = event["ts"] + event["dur"]
        total += max(end - max(event["ts"], last_end), 0)
        last_end = max(last_end, end)
    return {
        "busy_ms": total / 1000 / num_steps,
        "kernels": len(device_events) / num_steps,
        "longest": longest.most_common(LONGEST),
    }


def _free_memory() -> None:
    if torch.cuda.is_available():
        gc.collect()  # objects that the last call's error refers to
        torch.cuda.empty_cache()


def take_turns(
    group: list[Variant], until: float, device: str, make_worker: Callable[[], Worker]
) -> dict[str, Row]:
    """Prepare all variants at the same time, then time them in turns.

    Args:
        group: the variants.
        until: time on the clock of `time.monotonic` by which to stop, even after fewer rounds.
        device: cuda, or cpu for a dry run.
        make_worker: starts a process.

    Returns:
        Rows by name; a variant that failed has the reason in `failed`.
    """
    num_rounds = 1 if device == "cpu" else ROUNDS
    num_steps = 1 if device == "cpu" else STEPS
    workers = {variant: make_worker() for variant in group}
    rows = _prepare_all(workers, until, device)
    for number in range(num_rounds + 1):
        if number > 2 and time.monotonic() > until:
            break
        running = [variant for variant, row in rows.items() if "failed" not in row]
        for variant in random.Random(number).sample(running, len(running)):
            timing = workers[variant].call(TURN, turn, variant, num_steps, device)
            if "failed" in timing:
                rows[variant] |= timing
            elif number > 0:  # the first round warms up
                for key, value in timing.items():
                    rows[variant].setdefault(key, []).append(value)
    if time.monotonic() < until:
        for variant, row in rows.items():
            if "failed" not in row:
                row |= workers[variant].call(TURN, profile_step, variant, num_steps, device)
    for worker in workers.values():
        worker.close()
    end_all()
    return {variant.name: {"name": variant.name, **row} for variant, row in rows.items()}


def _prepare_all(workers: dict[Variant, Worker], until: float, device: str) -> dict[Variant, Row]:
    calls = {variant: worker.send(prepare, variant, device) for variant, worker in workers.items()}
    deadline = min(time.monotonic() + PREPARATION, until)
    rows = {variant: result_of(call, deadline) for variant, call in calls.items()}
    if time.monotonic() < until:
        for variant, row in rows.items():
            if "memory" in row.get("failed", ""):
                # Try again, now that no other variant is being prepared.
                rows[variant] = workers[variant].call(PREPARATION, prepare, variant, device)
    return rows


def command(args: argparse.Namespace) -> str:
    """Measure missing rows while there is time; return the tables of all rows.

    Existing rows of a group are measured again together with its missing rows, because ratios
    compare rows that were timed together.
    """
    until = time.monotonic() + args.seconds - RESERVE
    device = "cpu" if args.dry_run else "cuda"
    existing = {row["name"] for row in read(args.out)}
    if "machine" not in existing:
        append(args.out, _machine(args))
    left = []
    for group in groups(args.models or list(MODELS), dry_run=args.dry_run):
        missing = [variant.name for variant in group if variant.name not in existing]
        if not missing:
            continue
        if time.monotonic() + NEEDED > until:
            left += missing
            continue
        rows = take_turns(group, until, device, lambda: Worker(in_thread=args.dry_run))
        for name, row in rows.items():
            if row.get("failed") == LATE and time.monotonic() > until:
                left.append(name)
            else:
                append(args.out, row)
                print(f"{name}: {row.get('failed', 'done')}", flush=True)
    text = report(read(args.out))
    if left:
        text += f"\n\nno time for {len(left)}, run the command again: {'; '.join(left)}"
    return text


def _machine(args: argparse.Namespace) -> Row:
    device = "CPU, sizes of a dry run" if args.dry_run else torch.cuda.get_device_name()
    return {
        "name": "machine",
        "device": device,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
    }


def ratio(row: Row, base: Row | None) -> str:
    """Median, lowest and highest ratio of times, round by round; empty without a base."""
    if not base or not base.get("ms"):
        return ""
    ratios = [a / b for a, b in zip(row["ms"], base["ms"], strict=False)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def report(rows: list[Row]) -> str:
    """Tables of all rows in Markdown."""
    by_name = {row["name"]: row for row in rows}
    machine = by_name.pop("machine", {})
    lines: dict[str, list[list[str]]] = {}
    for name, row in by_name.items():
        model, batch, arm, mode = name.split(", ")
        title = f"{model}, {batch} images, bfloat16 autocast"
        same_mode = by_name.get(f"{model}, {batch}, {FLOAT}, {mode}")
        compiled = by_name.get(f"{model}, {batch}, {FLOAT}, compiled")
        cells = _cells(row, int(batch), same_mode, compiled)
        lines.setdefault(title, []).append([arm, mode, *cells])
    parts = [", ".join(f"{key}: {value}" for key, value in machine.items() if key != "name")]
    for title, cells_of_title in lines.items():
        parts.append(f"{title}\n\n{table(HEAD, cells_of_title)}")
    return "\n\n".join(parts)


def _cells(row: Row, batch: int, same_mode: Row | None, compiled: Row | None) -> list[str]:
    """Cells that follow arm and mode in a row; some compare the row with float rows."""
    if not row.get("ms"):
        return [row.get("failed", "not timed")[:100], *[""] * 8]
    ms = statistics.median(row["ms"])
    peak = max(row["peak"])
    busy_share = ""
    num_kernels = ""
    if "busy_ms" in row:
        busy_share = f"{row['busy_ms'] / ms:.2f}"
        num_kernels = f"{row['kernels']:.0f}"
    peak_ratio = ""
    if peak and same_mode and same_mode.get("peak"):
        peak_ratio = f"{peak / max(same_mode['peak']):.2f}"
    return [
        f"{ms:.2f}",
        ratio(row, same_mode),
        ratio(row, compiled),
        f"{1000 * batch / ms:.0f}",
        f"{statistics.median(row['host_ms']):.2f}",
        busy_share,
        num_kernels,
        f"{peak / GIB:.2f}",
        peak_ratio,
    ]
