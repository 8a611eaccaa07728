"""Time, memory and idleness of a CUDA device; on a CPU, for tries, the clock on the wall."""

from __future__ import annotations

import collections
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
WARM_UP, REPEATS, TOP = 3, 20, 8


def timed(run: Callable[[], Any], times: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of one of several runs behind each other.

    Returns:
        `ms`: between events on the device. `host_ms`: until the host has asked for everything; it waits where the device is some thousand
        kernels behind, so this is the most that the host needs. `peak`: bytes above what was allocated before.
    """
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(times):
            run()
        ms = 1000 * (time.perf_counter() - began) / times
        return {"ms": ms, "host_ms": ms, "peak": 0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    host = 1000 * (time.perf_counter() - began) / times
    end.synchronize()
    return {"ms": start.elapsed_time(end) / times, "host_ms": host, "peak": torch.cuda.max_memory_allocated() - before}


def median_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    warm_up, repeats = (WARM_UP, REPEATS) if device.type == "cuda" else (0, 1)
    for _ in range(warm_up):
        run()
    return statistics.median(timed(run, 1, device)["ms"] for _ in range(repeats))


def busy(run: Callable[[], Any], times: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a run in which the device does something, how many kernels that are, and those that take longest."""
    if device.type == "cpu":
        return {"busy_ms": None, "kernels": None, "longest": []}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return summed(json.loads(path.read_text())["traceEvents"], times)


def summed(events: list[dict[str, Any]], times: int) -> dict[str, Any]:
    """What `busy` tells, from the events of a trace: what overlaps counts once."""
    found = sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: e["ts"])
    total, last, by_name = 0.0, float("-inf"), collections.Counter[str]()
    for event in found:
        end = event["ts"] + event["dur"]
        total += max(end - max(event["ts"], last), 0)
        last = max(last, end)
        by_name[event["name"][:80]] += event["dur"]
    longest = [[name, us / 1000 / times] for name, us in by_name.most_common(TOP)]
    return {"busy_ms": total / 1000 / times, "kernels": len(found) / times, "longest": longest}
