"""Watching over the processes of a job: none is left waiting for one that is gone."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

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
        culprit: the one that failed, and its exit code; None while none has.
    """

    logs: list[Path]
    processes: list[subprocess.Popen] = field(default_factory=list)
    culprit: tuple[int, int] | None = None

    def wait(self) -> None:
        """Wait until all have ended; once one has failed the others get a moment, then are killed."""
        deadline = math.inf
        while any(process.poll() is None for process in self.processes):
            self._look()
            if self.culprit is not None:
                deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                self.end(signal.SIGKILL)
            time.sleep(TICK)
        self._look()

    def send(self, kind: signal.Signals) -> None:
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

    def _look(self) -> None:
        """Find the culprit: not one that merely lost the connection, unless all did; the first process where several failed at once."""
        failed = [(number, process.returncode) for number, process in enumerate(self.processes) if process.poll()]
        if self.culprit is None or self.culprit[1] == LOST:
            self.culprit = min(failed, key=lambda one: (one[1] == LOST, one[0]), default=None)

    def exit_code(self) -> int:
        """Of the culprit, as a shell has it; 0 where there is none."""
        code = 0 if self.culprit is None else self.culprit[1]
        return code if code >= 0 else 128 - code

    def complaint(self) -> str | None:
        """What is to be said of a job that failed; None where its first process has said it, or what it says is the same."""
        if self.culprit is None:
            return None
        number, code = self.culprit
        first = self.processes[0].returncode
        if code != LOST and code > 0 and first == code:
            return None
        return f"process {number} of {len(self.processes)} {_fate(code)}{self._last_words(number)}"

    def _last_words(self, number: int) -> str:
        if number == 0:
            return ""
        path = self.logs[number - 1]
        said = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
        return f": {said[-1]} ({path})" if said else ""


def _fate(code: int) -> str:
    if code == LOST:
        return "lost the connection to another"
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed ({name}{', often for want of memory' if name == 'SIGKILL' else ''})"
