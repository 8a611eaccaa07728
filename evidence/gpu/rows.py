"""Rows of results in a file of JSON lines, and workers: processes that may crash or hang."""

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
    """Add a line; several processes may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Read all complete lines; empty if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Worker:
    """Calls functions one after the other in a process that ends with this process.

    The functions return rows; after an error, the row has the reason in `failed`.

    Args:
        in_thread: use a thread of this process, for dry runs.
    """

    _pool: ThreadPoolExecutor | ProcessPoolExecutor

    def __init__(self, *, in_thread: bool = False) -> None:
        if in_thread:
            self._pool = ThreadPoolExecutor(1)
        else:
            spawn = multiprocessing.get_context("spawn")  # CUDA cannot be forked
            self._pool = ProcessPoolExecutor(1, spawn, _end_with_parent)

    def send(self, function: Callable[..., Row], *args: Any) -> Future[Row]:
        """Start a call."""
        return self._pool.submit(_guarded, function, *args)

    def call(self, seconds: float, function: Callable[..., Row], *args: Any) -> Row:
        """Call a function; after this many seconds, return the failure `LATE`."""
        return result_of(self.send(function, *args), time.monotonic() + seconds)

    def close(self) -> None:
        """Release the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def result_of(call: Future[Row], until: float) -> Row:
    """The row of a call, or the failure `LATE` if the call has not ended at time `until`.

    `until` is a time on the clock of `time.monotonic`.
    """
    try:
        return call.result(max(until - time.monotonic(), 0))
    except TimeoutError:
        return {"failed": LATE}
    except Exception as error:  # the process is gone
        return failure(error)


def end_all() -> None:
    """Kill the processes of all workers, because this process would wait for hanging workers."""
    for process in multiprocessing.active_children():
        process.kill()


def failure(error: BaseException) -> Row:
    """A row with the error as one line, and its traceback."""
    return {
        "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        "trace": traceback.format_exc()[-1500:],
    }


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _guarded(function: Callable[..., Row], *args: Any) -> Row:
    try:
        return function(*args)
    except Exception as error:  # any error is a result
        return failure(error)
