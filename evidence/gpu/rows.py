"""Rows as JSON lines, written as they come; calls in processes of their own, where what crashes or hangs ends nothing here."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LATE = "no answer in time"


def append(path: Path, row: Row) -> None:
    """Add a line; several processes may do so at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All whole lines; one that was cut short is none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Worker:
    """Calls functions one after the other in a process that ends with this one. They give rows; one with `failed` says why.

    Args:
        here: in a thread instead, for tries.
    """

    def __init__(self, *, here: bool = False) -> None:
        spawn = multiprocessing.get_context("spawn")  # CUDA cannot be forked
        self._pool = (
            ThreadPoolExecutor(1) if here else ProcessPoolExecutor(1, spawn, _end_with_parent)
        )

    def send(self, function: Callable[..., Row], *given: Any) -> Future[Row]:
        """Ask for a call."""
        return self._pool.submit(_guarded, function, *given)

    def call(self, seconds: float, function: Callable[..., Row], *given: Any) -> Row:
        """Its row, or why there is none within so many seconds."""
        return answer(self.send(function, *given), time.monotonic() + seconds)

    def close(self) -> None:
        """Let the process go."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def answer(asked: Future[Row], until: float) -> Row:
    """The row of a call that was asked for; `until`, by `time.monotonic`, is when to give up."""
    try:
        return asked.result(max(until - time.monotonic(), 0))
    except TimeoutError:
        return {"failed": LATE}
    except Exception as error:  # its process is gone
        return failure(error)


def end_all() -> None:
    """End the processes of all workers, those that hang too: else the end of this one would wait for them."""
    for process in multiprocessing.active_children():
        process.kill()


def failure(error: BaseException) -> Row:
    """The error in one line, and where it came from."""
    return {
        "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        "trace": traceback.format_exc()[-1500:],
    }


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _guarded(function: Callable[..., Row], *given: Any) -> Row:
    try:
        return function(*given)
    except Exception as error:  # whatever it is, it is the answer
        return failure(error)
