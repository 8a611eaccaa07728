"""Signals with which a cluster or a user asks a run to end.

SIGUSR1 and SIGUSR2 announce that the machine will be taken away: save, and resume elsewhere.
SIGTERM only means save and stop; a cluster that preempts with SIGTERM restarts the job itself.
SIGINT (Ctrl-C) also means save and stop; another one after `ECHO_S` ends the process immediately.
Outside training, a signal raises `Preempted` immediately; during training, it is recorded, and
`qat.callbacks.Preemption` acts on it after a step or validation. This module imports nothing heavy.
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

REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*REQUEUE_SIGNALS, signal.SIGTERM, signal.SIGINT)
# Seconds within which a rank may get the same Ctrl-C twice, from the terminal and from torchrun.
ECHO_S = 1.0
# Seconds that a loader process outlives a SIGTERM, because the training process needs it until the
# step is finished and saved.
OUTLIVE_S = 20


class Preempted(BaseException):
    """A signal has ended this run.

    Like KeyboardInterrupt, this class is not an `Exception`, so that no handler mistakes a signal
    for an error.

    Args:
        number: number of the signal.
        step: completed optimizer steps; None outside training.
        saved: checkpoint to resume from; None if nothing was written.
    """

    def __init__(self, number: int, step: int | None = None, saved: Path | None = None) -> None:
        super().__init__(number, step, saved)
        self.signal = signal.Signals(number)
        self.step = step
        self.saved = saved

    @property
    def name(self) -> str:
        """Name of the signal as users know it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name

    @property
    def wants_requeue(self) -> bool:
        """True if the run is meant to resume as soon as it can."""
        return self.signal in REQUEUE_SIGNALS


@dataclass
class _SignalState:
    """Signals that this process has received.

    Attributes:
        number: number of the received signal; 0 = none. Of several signals, the highest number
            counts, so that SIGTERM outranks SIGUSR1 on Linux.
        is_deferred: True = signals do not raise `Preempted`.
        interrupted_at: time of the first Ctrl-C, on the monotonic clock; None = there was none.
        process_id: id of the process that handles signals; in its forks, `_handle` does nothing.
    """

    number: int = 0
    is_deferred: bool = False
    interrupted_at: float | None = None
    process_id: int = 0


_state = _SignalState()


@contextlib.contextmanager
def handle_signals() -> Generator[None]:
    """Handle the signals in this block; outside the main thread, no handlers are installed."""
    earlier_handlers = {number: signal.getsignal(number) for number in SIGNALS}
    forget_signals()
    install_handlers()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in earlier_handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        forget_signals()


def install_handlers() -> None:
    """In the main thread, handle the signals from now on, even if a library had set handlers."""
    if threading.current_thread() is not threading.main_thread():
        return
    _state.process_id = os.getpid()
    for number in SIGNALS:
        # Ctrl-C stays ignored if a script runs in the background.
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def defer(*, on: bool) -> None:
    """If `on`, signals do not raise `Preempted` from now on; else the next signal does."""
    _state.is_deferred = on


def received_signal() -> int:
    """Number of the signal that this process has received; 0 = none."""
    return _state.number


def forget_signals() -> None:
    """Forget signals that have arrived; the next signal raises `Preempted`."""
    _state.number = 0
    _state.is_deferred = False
    _state.interrupted_at = None


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process_id:
        return
    if number == signal.SIGINT:
        current_time = time.monotonic()
        first_time = _state.interrupted_at
        if first_time is not None and current_time - first_time > ECHO_S:
            end_immediately(number, frame)
        _state.interrupted_at = first_time or current_time
    _state.number = max(_state.number, number)
    if not _state.is_deferred:
        # Do not raise a second exception while the first is being handled.
        _state.is_deferred = True
        raise Preempted(number)


def end_immediately(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """End this process with exit code 128 + `number`; print a line if `RANK` is 0 or not set."""
    if os.environ.get("RANK", "0") == "0":
        # Bypass Python's streams, because the interrupted code may be writing to them.
        os.write(2, b"stopped by Ctrl-C at once; files that were saved before are unchanged\n")
    os._exit(128 + number)


def ignore_signals(worker: int) -> None:
    """Keep a loader process alive until its training process has saved.

    A scheduler may send its signal to all processes of a job. SIGTERM ends the loader process after
    `OUTLIVE_S` seconds; the other signals are ignored.

    Args:
        worker: number of the loader process, passed by torch.
    """
    for number in (*REQUEUE_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLIVE_S))
