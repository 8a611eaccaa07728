"""One run at a time writes into a directory: the lock of a run directory. Imports nothing heavy.

It is held by the process that stands for the run: the one that starts the others, the first one under srun and torchrun. The operating
system gives it back when that process ends, however it ends; what the file says of its holder is for people alone. The package filelock
does not serve: where a file system has no locks it takes a file that is there for a lock, and a killed run would leave it behind. Locks of
POSIX (`lockf`) are not inherited by loader processes, which may outlive a run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Generator
from pathlib import Path

from qat.errors import UsageError
from qat.launch import ranks

log = logging.getLogger(__name__)

FILE = ".lock"
# Seconds that a job waits which SLURM has started again: a network file system may notice late that the node of its last stretch is gone.
PATIENCE_S, TICK_S = 120, 0.5
# Directories that this process holds, and the open file of each; None where there are no locks.
_held: dict[Path, int | None] = {}


class InUseError(UsageError):
    """Another run writes into the directory: nothing may be written there, not even that."""


@contextlib.contextmanager
def held(run_dir: str) -> Generator[None]:
    """Hold a directory during a block; one that was taken before is given back at the end, too.

    Raises:
        InUseError: another run holds it.
    """
    take(run_dir)
    if _held.get(Path(run_dir).resolve(), 0) is None:
        log.warning("run_dir=%r: this file system has no locks, so two runs in one directory would not notice each other", str(run_dir))
    try:
        yield
    finally:
        release(run_dir)


def take(run_dir: str) -> None:
    """Hold a directory from here on; nothing in a process that does not stand for its run, or where it is held already.

    Raises:
        InUseError: another run holds it.
    """
    folder = Path(run_dir).resolve()
    if folder in _held or not _stands_for_run():
        return
    folder.mkdir(parents=True, exist_ok=True)
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    deadline = time.monotonic() + (PATIENCE_S if restarted else 0)
    while True:
        try:
            _held[folder] = _locked(folder / FILE)
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                holder = _holder(folder / FILE)
                raise InUseError(
                    f"run_dir={str(run_dir)!r}: is in use by {holder}; must be another directory, or wait for it to end"
                ) from None
            time.sleep(TICK_S)
        else:
            return


def release(run_dir: str) -> None:
    """Give a directory back; nothing where it is not held."""
    folder = Path(run_dir).resolve()
    handle = _held.pop(folder, None)
    if handle is not None:
        with contextlib.suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)  # first: whoever waits for the old file sees that it is another
        os.close(handle)


def _stands_for_run() -> bool:
    """True for one process of a run: not for those that it starts, nor for those of other nodes."""
    return ranks.is_first() and ranks.is_on_first_node() and not ranks.is_started_here()


def _locked(path: Path) -> int | None:
    """The open, locked file; None where the file system has no locks.

    Raises:
        BlockingIOError, PermissionError: another process has it.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:
        if path.exists():  # another user's run
            raise
        return None
    except OSError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        is_current = False
    except (BlockingIOError, PermissionError):
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        path.unlink(missing_ok=True)
        return None
    if not is_current:  # its holder has just given it back
        os.close(handle)
        return _locked(path)
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
    return handle


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"
