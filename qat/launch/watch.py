"""Watching over the processes of a job: none is left waiting for one that is gone. Imports nothing heavy.

`torch.distributed.elastic.multiprocessing` does not serve (tried with torch 2.14): the moment one process fails it sends the others
SIGTERM, which a run answers by saving, and waits 30 s for them; the first process is often ended before it has said what is wrong. Of
failures in the same second it names any, and importing it takes 4 s and 600 MB in a process that only waits.
"""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from qat.launch import signals

# Exit code of a process that lost the connection to another: what happened to that one is the news.
LOST = 75
# Seconds. A mistake that all processes make is told by the first of them; one that ends leaves the others waiting for it.
GRACE, ENDING, TICK = 10.0, 5.0, 0.05


@dataclass
class Watch:
    """The processes of a job on this machine.

    Attributes:
        logs: where those behind the first write; what the first writes is what a person sees.
        processes: by local rank.
        failed: local rank and exit code of the one that failed first; None while none has.
        early: signals that came before all processes were there.
    """

    logs: list[Path]
    processes: list[subprocess.Popen] = field(default_factory=list)
    failed: tuple[int, int] | None = None
    early: list[int] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until all have ended; once one has failed the others get a moment, then are killed."""
        for number in self.early:
            self.send(number)
        deadline = math.inf
        while self._is_going():
            if self.failed is not None:
                deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                self.end(signal.SIGKILL)
            time.sleep(TICK)

    def hand_on(self, number: int, _: FrameType | None) -> None:
        """Take a signal by which a cluster or a person ends or preempts a job, for all of them.

        Raises:
            KeyboardInterrupt: it is a second Ctrl-C, which ends the job here.
        """
        if number == signal.SIGINT and signals.is_impatient():
            raise KeyboardInterrupt
        if len(self.processes) <= len(self.logs):
            self.early.append(number)
        else:
            self.send(number)

    def send(self, kind: int) -> None:
        """Send a signal to all that are alive."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(kind)

    def end(self, *kinds: signal.Signals) -> None:
        """Send signals, one after the other, until none is alive."""
        for kind in kinds:
            self.send(kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in self.processes:
                    process.wait(ENDING)

    def _is_going(self) -> bool:
        """False when all have ended; finds the one that failed first, the lowest of several, not one that merely lost the connection."""
        codes = [process.poll() for process in self.processes]
        if self.failed is None or self.failed[1] == LOST:
            found = ((number, code) for number, code in enumerate(codes) if code)
            self.failed = min(found, key=lambda one: (one[1] == LOST, one[0]), default=None)
        return None in codes

    def complaint(self) -> str | None:
        """One line about the failure; None where there is none, or the first process has said it itself."""
        if self.failed is None:
            return None
        number, code = self.failed
        if code > 0 and code != LOST and self.processes[0].returncode == code:
            return None
        said = self.logs[number - 1].read_text(encoding="utf-8", errors="replace").strip() if number else ""
        last = f": {said.splitlines()[-1].strip()} ({self.logs[number - 1]})" if said else ""
        return f"process {number} of {len(self.processes)} {_fate(code)}{last}"


def _fate(code: int) -> str:
    if code == LOST:
        return "lost the connection to another"
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed ({name}{', often for want of memory' if name == 'SIGKILL' else ''})"
