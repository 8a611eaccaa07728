"""Signals by which a cluster or a person asks a run to end.

SIGUSR1 and SIGUSR2 say that the machine is about to be taken away: save, go on elsewhere. SIGTERM says stop: save, and that is all; a
cluster that preempts with it starts the job again by itself. SIGINT, Ctrl-C, says the same; a second one does not wait. Outside training a
signal raises `Preempted` at once; inside, it is noted, and `qat.callbacks.Preemption` acts on it after the step under way. Imports nothing
heavy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LEAVING = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*LEAVING, signal.SIGTERM, signal.SIGINT)
# Seconds within which one Ctrl-C comes twice to a rank, from the terminal and from torchrun.
ECHO_S = 1.0
# Seconds that a loader process outlives a SIGTERM: the training process needs it until its step is done and saved.
OUTLIVE_S = 20


class Preempted(BaseException):
    """A signal has ended this run. Like KeyboardInterrupt no `Exception`: no handler on the way takes it for an error of its own.

    Args:
        number: of the signal.
        step: optimizer steps after which the run stands; None outside training.
        saved: what it goes on from, None where nothing was written.
    """

    def __init__(self, number: int, step: int | None = None, saved: Path | None = None) -> None:
        super().__init__(number, step, saved)
        self.signal, self.step, self.saved = signal.Signals(number), step, saved

    @property
    def name(self) -> str:
        """Of the signal, as a person knows it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name

    @property
    def wants_requeue(self) -> bool:
        """True if the run is meant to go on as soon as it can."""
        return self.signal in LEAVING


@dataclass
class _Arrivals:
    """What has arrived in this process.

    Attributes:
        number: the signal that counts: of several the highest, so that SIGTERM outranks a wish to go on elsewhere. 0 = none.
        is_deferred: noted only.
        interrupted_at: when Ctrl-C came, on the monotonic clock; None = it has not.
        process: the one that listens; copies of it, which loaders make, leave signals to it.
    """

    number: int = 0
    is_deferred: bool = False
    interrupted_at: float | None = None
    process: int = 0


_arrivals = _Arrivals()


@contextlib.contextmanager
def listening() -> Generator[None]:
    """Note the signals, or raise `Preempted`. Nothing outside the main thread, where none arrives."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    forget()
    listen()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, old in before.items():
                signal.signal(number, signal.SIG_DFL if old is None else old)
        forget()


def listen() -> None:
    """Take the signals, also from a library that has taken them since."""
    if threading.current_thread() is not threading.main_thread():
        return
    _arrivals.process = os.getpid()
    for number in SIGNALS:
        if (
            number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
        ):  # as it is in the background of a script
            signal.signal(number, _note)


def defer(*, on: bool) -> None:
    """Note signals only, or have the next one raise `Preempted`."""
    _arrivals.is_deferred = on


def arrived() -> int:
    """Number of the signal that has arrived, 0 = none."""
    return _arrivals.number


def forget() -> None:
    """Begin anew: nothing has arrived, and the next signal counts at once."""
    _arrivals.number, _arrivals.is_deferred, _arrivals.interrupted_at = 0, False, None


def _note(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _arrivals.process:
        return
    if number == signal.SIGINT:
        now = time.monotonic()
        if _arrivals.interrupted_at is not None and now - _arrivals.interrupted_at > ECHO_S:
            end_at_once(number, frame)
        _arrivals.interrupted_at = _arrivals.interrupted_at or now
    _arrivals.number = max(_arrivals.number, number)
    if not _arrivals.is_deferred:
        _arrivals.is_deferred = (
            True  # what cleans up after the exception is not interrupted by another one
        )
        raise Preempted(number)


def end_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """End this process with one line; files that are being written do not come into being, those that are there stay."""
    if os.environ.get("RANK", "0") == "0":
        # Not by way of Python's streams: what is interrupted may be writing to them.
        os.write(2, b"stopped by Ctrl-C at once; what was saved before is as it was\n")
    os._exit(128 + number)


def ignore_signals(worker: int) -> None:
    """Keep a loader process alive as long as its training process: a scheduler may send the signal to all processes of a job.

    Args:
        worker: its number, which torch gives.
    """
    for number in (*LEAVING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLIVE_S))
