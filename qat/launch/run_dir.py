"""A run directory: one run at a time writes into it, and which files make it a used one. Imports nothing heavy.

The lock is held by the first process of a run, or by what started its processes. The operating system gives it back when that process
ends, however it ends; what the file says of its holder is for people alone. The package filelock does not serve: its locks are inherited by
loader processes, which may outlive a run; those of POSIX (`lockf`) are not.
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
from qat.utils.text import json_object
from qat.utils.validate import check_text

log = logging.getLogger(__name__)

LOCK, RESULTS, CONFIG = ".lock", "results.json", "config.yaml"
# Seconds that a job waits which SLURM has started again: a network file system may notice late that the node of its last stretch is gone.
PATIENCE_S, TICK_S = 120, 0.5
# What a training writes; train.log is that of the run that asks, by then.
TRAINING = (
    *(f"checkpoints/{name}" for name in ("best.ckpt", "last.ckpt", "last.prev.ckpt")),
    "checkpoints/best-epoch*.ckpt",
    *(
        RESULTS,
        "metrics.csv",
        CONFIG,
        "command.json",
        "conversion.txt",
        "oscillation.csv",
        "report.html",
    ),
    "events.out.tfevents.*",
    *(
        f"analysis/{name}{rest}"
        for name in ("cost", "weights")
        for rest in (".csv", ".json", "_*.csv", "_*.svg")
    ),
)
# What the commands write.
WRITTEN = (
    *TRAINING,
    *("quantized.ckpt", "reconstruct.csv", "reconstruct.ckpt", "search.csv", "search.ckpt"),
    *("classes.csv", "confusion.csv", "predictions.csv"),
    *(
        f"{prefix}net.{suffix}"
        for prefix in ("", ".unchecked.")
        for suffix in ("onnx", "safetensors", "pte")
    ),
)
# Directories that this process has locked, and the open file of each.
_locked: dict[Path, int] = {}


class UsedError(UsageError):
    """The directory is another run's: nothing is written there, not even this error."""


@contextlib.contextmanager
def locked(run_dir: str) -> Generator[None]:
    """Lock a directory during a block; one that was locked before is given back at the end, too.

    Raises:
        UsedError: another run writes into it.
    """
    lock(run_dir)
    try:
        yield
    finally:
        unlock(run_dir)


def lock(run_dir: str) -> None:
    """Lock a directory from here on; nothing in a process that is not the first of its run, or where it is locked already.

    Raises:
        UsageError: it has no name, as of a variable of a shell that is not set.
        UsedError: another run writes into it.
    """
    check_text("run_dir", run_dir)
    folder = Path(run_dir).resolve()
    if (
        folder in _locked
        or not ranks.is_first()
        or os.environ.get(ranks.HELD) == str(folder / LOCK)
    ):
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    deadline = time.monotonic() + (
        PATIENCE_S if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0
    )
    while folder not in _locked:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(
                os.fstat(handle), path.stat()
            ):  # else its holder has just given it back
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
                _locked[folder] = handle
                return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                holder = (
                    path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
                )
                os.close(handle)
                raise UsedError(
                    f"run_dir={str(run_dir)!r}: is in use by {holder}; must be another directory, or wait for it to end"
                ) from None
            time.sleep(TICK_S)
        except OSError:
            log.warning(
                "run_dir=%r: this file system has no locks; make sure that only one run writes there",
                str(run_dir),
            )
            _locked[folder] = handle
            return
        os.close(handle)


def unlock(run_dir: str) -> None:
    """Give a directory back; nothing where it is not locked."""
    folder = Path(run_dir).resolve()
    handle = _locked.pop(folder, None)
    if handle is not None:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(
                missing_ok=True
            )  # first: a run that waits for the old file sees that it is another
        os.close(handle)


def lock_for_ranks(run_dir: str) -> None:
    """Lock a directory until the program that replaces this one has ended: the ranks that it starts find it locked for them.

    Raises:
        UsedError: another run writes into it.
    """
    lock(run_dir)
    folder = Path(run_dir).resolve()
    os.set_inheritable(_locked[folder], True)  # noqa: FBT003
    os.environ[ranks.HELD] = str(folder / LOCK)


def used(run_dir: Path) -> list[Path]:
    """Files that make a directory a used one, checkpoints first; none where a run failed before it saved anything."""
    found = checkpoints(run_dir)
    if not found and json_object(run_dir / RESULTS).get("error"):
        return []
    return found + [path for path in of_training(run_dir) if path not in found]


def checkpoints(run_dir: Path) -> list[Path]:
    """What a command could go on from, or start from."""
    return sorted([*run_dir.glob("checkpoints/*.ckpt"), *run_dir.glob("*.ckpt")])


def of_training(run_dir: Path) -> list[Path]:
    """What a training has left, by name: what a new one replaces."""
    return [
        path
        for pattern in TRAINING
        for path in sorted(run_dir.glob(pattern))
        if path.is_symlink() or path.is_file()
    ]


def is_finished(run_dir: Path) -> bool:
    """True if there are results, and they are not the error of a run."""
    return (run_dir / RESULTS).exists() and not json_object(run_dir / RESULTS).get("error")


def check_own(run_dir: Path, command: str, weights: str | None = None) -> None:
    """Raise `UsedError` if there are checkpoints or results of another command or, where they are given, results of other weights.

    For commands that write into a directory of theirs again: what is there would be replaced by what says nothing of it.
    """
    names = (
        ("checkpoints/*",)
        if command == "ptq"
        else ("checkpoints/*", "quantized", "reconstruct", "search")
    )
    saved = [path for name in names for path in sorted(run_dir.glob(f"{name}.ckpt"))]
    found = {} if not is_finished(run_dir) else json_object(run_dir / RESULTS)
    another = found.get("command") not in {None, command} or (
        weights is not None and found.get("weights") not in {None, weights}
    )
    if saved or another:
        what = (
            saved[0].relative_to(run_dir)
            if saved
            else f"{RESULTS} of {found.get('command')}.py {found.get('weights')}"
        )
        raise UsedError(f"run_dir={str(run_dir)!r} holds {what} already; choose another run_dir")


class RunDirState:
    """A directory as a command finds it.

    Args:
        run_dir: the directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self._was_used, self._config = (
            run_dir,
            bool(used(run_dir)),
            _stamp(run_dir / CONFIG),
        )

    def has_begun(self) -> bool:
        """True if the run has written its settings since, which it does once they are checked."""
        return _stamp(self.run_dir / CONFIG) != self._config

    def takes_error(self) -> bool:
        """True if results with the run's error would not stand among, or in place of, the files of another run."""
        return (self.has_begun() or not self._was_used) and not is_finished(self.run_dir)


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from another that has taken its name."""
    if not path.exists():
        return None
    at = path.stat()
    return at.st_ino, at.st_mtime_ns
