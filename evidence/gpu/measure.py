"""Everything that a training step's speed is judged by, in the order of what it is worth."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evidence.gpu import checks, kernels, matmuls, report, steps
from evidence.gpu.children import Child, Here
from evidence.gpu.records import Records

Start = Callable[..., Any]
# Seconds that a row may take; one is begun only with `NEEDED` left.
ROW, NEEDED = 150.0, 10.0
# Seconds for the last rounds of a group whose first steps were done in time, and for the tables.
RESERVE = 60.0
ROUNDS, STEPS = 7, 3


def caches(folder: Path) -> None:
    """Have all processes share what is compiled, and take turns on the cores."""
    for name, kept in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str((folder / "compiled" / kept).resolve()))
    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "2")


def each(records: Records, start: Callable[[], Any], calls: dict[str, tuple[Any, ...]]) -> None:
    """A row for each call of an object's methods; behind one that failed in a process of its own again, as errors of a device stay.

    Args:
        records: where rows go.
        start: makes the object's process.
        calls: method and arguments by the name of the row.
    """
    child = None
    for name, call in calls.items():
        if not records.wants(name, needs=NEEDED):
            continue
        child = child or start()
        child.send(*call)
        row = child.receive(time.monotonic() + ROW)
        records.add(name, row)
        if "failed" in row:
            child.close()
            child = None
    if child is not None:
        child.close()


def measure(out: Path, seconds: float, models: list[str], *, dry_run: bool) -> str:
    """Measure what is not there yet and time is left for.

    Args:
        out: JSON lines.
        seconds: that all of it may take.
        models: timm's names.
        dry_run: tiny nets on the CPU.

    Returns:
        Tables of all that is there.
    """
    records, make = Records(out, seconds - RESERVE), Here if dry_run else Child
    caches(out.parent)
    rounds, n_steps = (1, 1) if dry_run else (ROUNDS, STEPS)

    def start(kind: Callable[..., Any], *arguments: Any) -> Any:
        return make(functools.partial(kind, dry_run=dry_run), *arguments)

    def prepared(members: list[steps.Variant]) -> steps.Group:
        return steps.Group(members, records, functools.partial(start, steps.Stepper))

    first, *others = steps.groups(models, dry_run=dry_run)
    under_way = prepared(first)  # compiles during the checks
    each(records, functools.partial(start, checks.Checks), {f"check, {name}": ("check", name) for name in checks.names(dry_run=dry_run)})
    under_way.finish(rounds, n_steps)
    of_kernels = {"machine": ("machine",), **{f"kernel, {name}": ("kernel", name) for name in kernels.NAMES}}
    each(records, functools.partial(start, kernels.Kernels), of_kernels)
    for members in others:
        prepared(members).finish(rounds, n_steps)
    each(records, functools.partial(start, matmuls.Products, models[-1], 256), {f"products, {models[-1]}": ("measure",)})
    left = f"\n\nno time for {len(records.left)}, run the command again: {'; '.join(records.left)}" if records.left else ""
    return report.text(records.rows) + left
