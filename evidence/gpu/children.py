"""Objects in processes of their own: what crashes or hangs there ends nothing here. Imports nothing heavy."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Iterable
from typing import Any

from evidence.gpu.records import Row, failure

# Ends a child that was told to go and does not.
PATIENCE = 5.0
LATE = "no answer in time"


def _serve(connection: multiprocessing.connection.Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Make the object, then call its methods as they are asked for, until nobody asks any more."""
    made: Any = None
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        try:
            made = make(*arguments) if made is None else made
            connection.send(getattr(made, method)(*given))
        except Exception as error:  # whatever it is, it is the answer
            connection.send(failure(error))


class Child:
    """Calls the methods of an object in another process. They return rows; a row with `failed` says why there is no other.

    Args:
        make: makes the object there.
        arguments: of `make`.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        self.is_alive = True
        atexit.register(self.close)  # else the end would wait for a child that waits for calls

    def send(self, method: str, *given: Any) -> None:
        """Ask for a call; `receive` has its result."""
        try:
            self.connection.send((method, given))
        except OSError:
            self.is_alive = False

    def receive(self, until: float) -> Row:
        """The result of the call that was asked for.

        Args:
            until: when to give up, by `time.monotonic`; the process is ended then.
        """
        if not self.is_alive:
            return {"failed": f"its process had ended with exit code {self._process.exitcode}"}
        try:
            if self.connection.poll(max(until - time.monotonic(), 0)):
                return self.connection.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE)
            self.is_alive = False
            return {"failed": f"its process ended with exit code {self._process.exitcode}"}
        self.close()
        return {"failed": LATE}

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        self.is_alive = False
        self.connection.close()
        self._process.terminate()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()


def first_ready(children: Iterable[Any], until: float) -> list[Any]:
    """Those whose `receive` need not wait, as soon as there is one; none if there is none in time."""
    waiting = list(children)
    ended = [child for child in waiting if isinstance(child, Here) or not child.is_alive]
    if ended:
        return ended
    ready = multiprocessing.connection.wait([child.connection for child in waiting], max(until - time.monotonic(), 0))
    return [child for child in waiting if child.connection in ready]


class Here:
    """A `Child` without a process, for tries."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._made = make(*arguments)
        self._row: Row = {}
        self.is_alive = True

    def send(self, method: str, *given: Any) -> None:
        """See `Child`."""
        try:
            self._row = getattr(self._made, method)(*given)
        except Exception as error:
            self._row = failure(error)

    def receive(self, until: float) -> Row:
        """See `Child`."""
        return self._row

    def close(self) -> None:
        """See `Child`."""
