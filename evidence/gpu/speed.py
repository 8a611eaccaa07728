"""Training steps in bfloat16 autocast by model, batch, arm and mode: a process each, which compiles while others do and is timed in turns.

A turn is a few steps; in each round every variant of a group has one, in an order drawn anew, so that a ratio to the float net is one of
neighbours in time.
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

from evidence.gpu.rows import LATE, Row, Worker, answer, append, end_all, read
from evidence.speed.steps import ARMS, FLOAT, TINY, build, teacher_of, training_step
from evidence.speed.timing import table
from qat import kernels
from qat.lit.compiled import compile_in_place

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
WARM_UP, ROUNDS, STEPS = 3, 7, 3
ORDER = (
    *((256, mode) for mode in ("compiled", "graphs", "eager", "compiled + graph")),
    *((64, mode) for mode in ("compiled", "eager", "compiled + graph")),
)
# Seconds that a group's first steps may take, and those of a turn; a group is begun only with this much left.
PREPARATION, TURN, NEEDED, RESERVE = 200.0, 60.0, 60.0, 60.0
GIB = 2**30
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
_ready: dict[Variant, Callable[[], Any]] = {}  # in the process of a variant: its step


class Variant(NamedTuple):
    """A step that is timed: timm's name, images, one of `ARMS`, and how it runs.

    Modes: `compiled`, `graphs` (as `compile=graphs` compiles), `compiled + graph` (in a CUDA graph, optimizer included), `eager`.
    """

    model: str
    batch: int
    arm: str
    mode: str

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.model}, {self.batch}, {self.arm}, {self.mode}"


def groups(models: list[str], *, dry_run: bool) -> list[list[Variant]]:
    """What is timed together, the most valuable answers first."""
    order = ((2, "compiled"), (2, "eager")) if dry_run else ORDER
    return [
        [Variant(model, batch, arm, mode) for arm in ARMS]
        for batch, mode in order
        for model in (models[:1] if dry_run else models)
    ]


def prepare(variant: Variant, device: str) -> Row:
    """The first steps; asked for again after it ran out of memory, what is compiled already is there."""
    _give_back()
    model, batch, arm, mode = variant
    is_try, is_compiled, graphs = device == "cpu", mode != "eager", mode == "graphs"
    # Not "auto" for what is measured with kernels: a device on which they fail would be timed without them.
    kernels.use("triton" if mode == "eager" and arm != FLOAT and not is_try else "auto")
    began = time.monotonic()
    if variant not in _ready:
        sizes: dict[str, Any] = TINY | {"depth": 1} if is_try else {}
        images = torch.randn(batch, 3, *[sizes.get("img_size", 224)] * 2, device=device)
        net, teacher = (
            build(model, ARMS[arm], images, **sizes),
            teacher_of(model, ARMS[arm], images, **sizes),
        )
        if is_compiled and not is_try:
            compile_in_place(net, graphs=graphs)
            if teacher is not None:
                teacher.compile(graphs=graphs)
        step = training_step(net, images, teacher, half=True)
        _ready[variant] = (
            (lambda: (torch.compiler.cudagraph_mark_step_begin(), step())[1]) if graphs else step
        )
    loss, first = _ready[variant]().item(), time.monotonic() - began
    if mode.endswith("graph") and not is_try:
        _ready[variant] = captured(_ready[variant])
    _give_back()
    return {"first_s": first, "loss": loss}


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """A CUDA graph of a whole step, weights' update included; it holds the step, whose tensors it works on."""
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
    return lambda: (graph.replay(), step)


def turn(variant: Variant, times: int, device: str) -> Row:
    """A few steps, timed; the one before them gets its memory from the device anew.

    Returns:
        Of one step: `ms` between events on the device; `host_ms` until the host has asked for everything (it waits where the device is some
        thousand kernels behind, so this is the most that the host needs); `peak` bytes above what was allocated before.
    """
    step = _ready[variant]
    step()
    if device == "cpu":
        began = time.perf_counter()
        step()
        ms = 1000 * (time.perf_counter() - began)
        return {"ms": ms, "host_ms": ms, "peak": 0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        step()
    end.record()
    host = 1000 * (time.perf_counter() - began) / times
    end.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    _give_back()
    return {"ms": start.elapsed_time(end) / times, "host_ms": host, "peak": peak}


def idleness(variant: Variant, times: int, device: str) -> Row:
    """Milliseconds of a step in which the device does something, how many kernels that are, and where both device and host spend theirs."""
    if device == "cpu":
        return {}
    torch.cuda.synchronize()
    with cProfile.Profile() as host:
        for _ in range(times):
            _ready[variant]()
    spent = sorted(
        pstats.Stats(host).get_stats_profile().func_profiles.items(),
        key=lambda item: -item[1].tottime,
    )[:40]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            _ready[variant]()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        found = busy(json.loads(path.read_text())["traceEvents"], times)
    return {
        **found,
        "host": [(name, 1000 * one.tottime / times, one.ncalls) for name, one in spent],
    }


def busy(events: list[dict[str, Any]], times: int) -> Row:
    """From the events of a trace, in microseconds: what overlaps counts once."""
    found = sorted(
        (e for e in events if e.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"}),
        key=lambda e: e["ts"],
    )
    total, last, longest = 0.0, float("-inf"), collections.Counter[str]()
    for event in found:
        longest[event["name"][:80]] += event["dur"] / 1000 / times
        end = event["ts"] + event["dur"]
        total += max(end - max(event["ts"], last), 0)
        last = max(last, end)
    return {
        "busy_ms": total / 1000 / times,
        "kernels": len(found) / times,
        "longest": longest.most_common(40),
    }


def _give_back() -> None:
    if torch.cuda.is_available():
        gc.collect()  # what an error of the last call holds on to
        torch.cuda.empty_cache()


def take_turns(
    group: list[Variant], until: float, device: str, make: Callable[[], Worker]
) -> dict[str, Row]:
    """Prepare all side by side, then let those that can take turns; without time for all rounds those so far are all there are."""
    rounds, times = (1, 1) if device == "cpu" else (ROUNDS, STEPS)
    workers = {variant: make() for variant in group}
    asked = {variant: worker.send(prepare, variant, device) for variant, worker in workers.items()}
    ready = min(time.monotonic() + PREPARATION, until)
    rows = {variant: answer(one, ready) for variant, one in asked.items()}
    for variant in [
        variant
        for variant, row in rows.items()
        if "memory" in row.get("failed", "") and time.monotonic() < until
    ]:
        rows[variant] = workers[variant].call(
            PREPARATION, prepare, variant, device
        )  # now that no other is at it
    for number in range(rounds + 1):
        if number > 2 and time.monotonic() > until:
            break
        running = [variant for variant, row in rows.items() if "failed" not in row]
        for variant in random.Random(number).sample(running, len(running)):
            found = workers[variant].call(TURN, turn, variant, times, device)
            if "failed" in found:
                rows[variant] |= found
            elif number:  # the first round is not kept
                for key, value in found.items():
                    rows[variant].setdefault(key, []).append(value)
    for variant in [
        variant for variant, row in rows.items() if "failed" not in row and time.monotonic() < until
    ]:
        rows[variant] |= workers[variant].call(TURN, idleness, variant, times, device)
    for worker in workers.values():
        worker.close()
    end_all()
    return {variant.name: {"name": variant.name, **row} for variant, row in rows.items()}


def command(args: argparse.Namespace) -> str:
    """Measure what is not there yet and time is left for; gives the tables of all that is there.

    Rows that are there are measured again beside others of their group: a ratio needs its neighbour.
    """
    out, until, left, device = (
        args.out,
        time.monotonic() + args.seconds - RESERVE,
        [],
        "cpu" if args.dry_run else "cuda",
    )
    known = {row["name"] for row in read(out)}
    if "machine" not in known:
        name = "CPU, sizes for a try alone" if args.dry_run else torch.cuda.get_device_name()
        append(
            out,
            {
                "name": "machine",
                "device": name,
                "torch": torch.__version__,
                "CUDA": torch.version.cuda,
            },
        )
    for group in groups(args.models or list(MODELS), dry_run=args.dry_run):
        missing = [variant.name for variant in group if variant.name not in known]
        if missing and time.monotonic() + NEEDED > until:
            left += missing
        elif missing:
            for name, row in take_turns(
                group, until, device, lambda: Worker(here=args.dry_run)
            ).items():
                if row.get("failed") == LATE and time.monotonic() > until:
                    left.append(name)
                else:
                    append(out, row)
                    print(f"{name}: {row.get('failed', 'done')}", flush=True)
    again = f"\n\nno time for {len(left)}, run the command again: {'; '.join(left)}" if left else ""
    return report(read(out)) + again


def ratio(row: Row, base: Row | None) -> str:
    """Of times: the median of the ratios of rounds, lowest and highest; within a group both ran in turns."""
    if not base or not base.get("ms"):
        return ""
    ratios = [a / b for a, b in zip(row["ms"], base["ms"], strict=False)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def report(rows: list[Row]) -> str:
    """Markdown of all rows."""
    of = {row["name"]: row for row in rows}
    machine, lines = of.pop("machine", {}), dict[str, list[list[str]]]()
    for name, row in of.items():
        model, batch, arm, mode = name.split(", ")
        here = lines.setdefault(f"{model}, {batch} images, bfloat16 autocast", [])
        if not row.get("ms"):
            here.append([arm, mode, row.get("failed", "not timed")[:100], *[""] * 8])
            continue
        same, base = (of.get(f"{model}, {batch}, {FLOAT}, {one}") for one in (mode, "compiled"))
        ms, peak = statistics.median(row["ms"]), max(row["peak"])
        cells = [
            f"{ms:.2f}",
            ratio(row, same),
            ratio(row, base),
            f"{1000 * int(batch) / ms:.0f}",
            f"{statistics.median(row['host_ms']):.2f}",
        ]
        cells += (
            [f"{row['busy_ms'] / ms:.2f}", f"{row['kernels']:.0f}"]
            if "busy_ms" in row
            else ["", ""]
        )
        cells += [
            f"{peak / GIB:.2f}",
            f"{peak / max(same['peak']):.2f}" if peak and same and same.get("peak") else "",
        ]
        here.append([arm, mode, *cells])
    parts = [", ".join(f"{key}: {value}" for key, value in machine.items() if key != "name")]
    return "\n\n".join([
        *parts,
        *(f"{title}\n\n{table(HEAD, cells)}" for title, cells in lines.items()),
    ])
