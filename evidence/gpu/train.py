"""Several processes train the runs of `plan` on one device, each in its turn.

A run whose last row is there is not done again; one that failed is, since those beside it may have taken its memory.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from typing import Any

from evidence.gpu import records, summary
from evidence.gpu.children import LATE, Child, Here, first_ready
from evidence.gpu.cifar import prepare
from evidence.gpu.job import Job, Setting
from evidence.gpu.measure import caches
from evidence.gpu.plan import Run, runs

BATCH = 512
# Seconds that have to be left to begin a run: its first epoch compiles.
NEEDED = 60.0
# A process that does not look at the clock is ended this much behind the end.
GRACE = 15.0


class Crew:
    """Processes that train side by side.

    Args:
        wanted: runs in order.
        setting: of all.
        processes: how many at a time.
        until: when to end, by `time.monotonic`.
    """

    def __init__(self, wanted: list[Run], setting: Setting, processes: int, until: float) -> None:
        self.setting, self.processes, self.until = setting, processes, until
        self.done = {f"{row['variant']} seed{row['seed']}" for row in records.begin(setting.out) if "test" in row}
        self.waiting = [run for run in wanted if run.name not in self.done]
        self.running: dict[str, Any] = {}
        self.make = Here if setting.dry_run else Child

    def work(self) -> list[str]:
        """Train; gives what is not done."""
        self._start()
        while self.running:
            by_child = {child: name for name, child in self.running.items()}
            ready = first_ready(by_child, self.until + GRACE)
            for child in ready or by_child:
                self._end(by_child[child], child.receive(time.monotonic()))
            self._start()
        return [run.name for run in self.waiting]

    def _start(self) -> None:
        """Fill the places with runs that have what they need."""
        for run in self.waiting:
            can_start = run.name not in self.running and (not run.needs or run.needs in self.done)
            if can_start and len(self.running) < self.processes and time.monotonic() + NEEDED < self.until:
                self.running[run.name] = child = self.make(Job, run, self.setting)
                child.send("train", self.until)

    def _end(self, name: str, row: records.Row) -> None:
        run = next(run for run in self.waiting if run.name == name)
        self.running.pop(name).close()
        if "test" in row:
            self.done.add(name)
            self.waiting.remove(run)
            print(f"{name}: test {row['test']:.2f}", flush=True)
        elif row.get("failed", LATE) != LATE:
            self.waiting.remove(run)
            records.append(self.setting.out, {"variant": run.variant, "seed": run.seed, **row})
            print(f"{name}: {row['failed']}", flush=True)


def train(args: argparse.Namespace) -> str:
    """Train what is not there yet and time is left for; gives the tables of all that is there."""
    until = time.monotonic() + args.seconds - GRACE
    caches(args.out.parent)
    kept = args.out.parent / "cifar10.pt"
    prepare(args.train, kept, dry_run=args.dry_run)
    epochs, float_epochs, batch = (2, 2, 8) if args.dry_run else (args.epochs, args.float_epochs, BATCH)
    setting = Setting(args.out, kept, epochs, float_epochs, batch, args.dry_run)
    wanted = [run for run in runs(dry_run=args.dry_run) if fnmatch.fnmatch(run.name, args.only)]
    left = Crew(wanted, setting, args.processes, until).work()
    more = f"\n\n{len(left)} runs are left or failed, run the command again: {', '.join(left)}" if left else ""
    return summary.text(records.read(args.out)) + more
