"""Run directories: the lock, so that only one run at a time writes there, and the files of a run.

This module imports nothing heavy.

The lock belongs to the first process of a run, or to the process that started the ranks. The
operating system releases the lock when this process ends, however it ends; the text in the lock
file is only for users. The package filelock cannot be used: its locks are inherited by loader
processes, which may outlive a run; POSIX locks (`lockf`) are not inherited.
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

LOCK = ".lock"
RESULTS = "results.json"
CONFIG = "config.yaml"
# Seconds that a job waits for the lock after SLURM has restarted it: a network file system may
# notice late that the previous run's node is gone.
LOCK_TIMEOUT_S = 120
RETRY_S = 0.5
# Files of a training run that a new run replaces. train.log is not among them: the new run
# has already opened its own train.log when it looks for files of earlier runs.
TRAINING_OUTPUTS = (
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "checkpoints/last.prev.ckpt",
    "checkpoints/best-epoch*.ckpt",
    RESULTS,
    "classes.csv",
    "confusion.csv",
    "metrics.csv",
    CONFIG,
    "command.json",
    "conversion.txt",
    "oscillation.csv",
    "report.html",
    "events.out.tfevents.*",
    "analysis/cost.csv",
    "analysis/cost.json",
    "analysis/cost_*.csv",
    "analysis/cost_*.svg",
    "analysis/weights.csv",
    "analysis/weights.json",
    "analysis/weights_*.csv",
    "analysis/weights_*.svg",
)
# Files of all commands.
ALL_OUTPUTS = (
    *TRAINING_OUTPUTS,
    "quantized.ckpt",
    "reconstruct.csv",
    "reconstruct.ckpt",
    "search.csv",
    "search.ckpt",
    "predictions.csv",
    "net.onnx",
    "net.safetensors",
    "net.pte",
    ".unchecked.net.onnx",
    ".unchecked.net.safetensors",
    ".unchecked.net.pte",
)
# Directories that this process has locked, and the open lock file of each.
_locked: dict[Path, int] = {}


class UsedError(UsageError):
    """The directory belongs to another run, so nothing is written there, not even this error."""


@contextlib.contextmanager
def hold_lock(run_dir: str) -> Generator[None]:
    """Lock a directory during a block; unlock it even if this process had locked it before.

    Raises:
        UsageError: see `lock`.
    """
    lock(run_dir)
    try:
        yield
    finally:
        unlock(run_dir)


def lock(run_dir: str) -> None:
    """Lock a directory until `unlock`.

    Do nothing if this process or its launcher has already locked the directory, or if this process
    is not the first one of its run. Only warn if the file system has no locks.

    Raises:
        UsageError: the name is empty, for example because a shell variable is not set.
        UsedError: another run writes into the directory.
    """
    check_text("run_dir", run_dir)
    folder = Path(run_dir).resolve()
    path = folder / LOCK
    is_locked_by_launcher = os.environ.get(ranks.LOCK_FILE) == str(path)
    if folder in _locked or is_locked_by_launcher or not ranks.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    is_restart = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    deadline = time.monotonic() + (LOCK_TIMEOUT_S if is_restart else 0)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Try again if the previous run has just removed this file: another process could lock a
            # new one.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                _locked[folder] = handle
                owner = f"process {os.getpid()} on host {socket.gethostname()}\n"
                with contextlib.suppress(OSError):  # for example a full disk
                    os.ftruncate(handle, 0)
                    os.write(handle, owner.encode())
                return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                os.close(handle)
                raise _in_use_error(run_dir, path) from None
            time.sleep(RETRY_S)
        except OSError:
            log.warning(
                "run_dir=%r: this file system has no locks; "
                "make sure that only one run writes there",
                str(run_dir),
            )
            _locked[folder] = handle
            return
        os.close(handle)


def _in_use_error(run_dir: str, path: Path) -> UsedError:
    owner = ""
    with contextlib.suppress(OSError):  # the other process may have just ended
        owner = path.read_text(encoding="utf-8", errors="replace").strip()
    owner = owner or "another process"
    return UsedError(
        f"run_dir={str(run_dir)!r}: is in use by {owner}; "
        "must be another directory, or wait until that process ends"
    )


def unlock(run_dir: str) -> None:
    """Unlock a directory; do nothing if it is not locked."""
    folder = Path(run_dir).resolve()
    handle = _locked.pop(folder, None)
    if handle is not None:
        # Remove the file first: a run that has opened the file then sees that the file is gone.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)


def lock_for_ranks(run_dir: str) -> None:
    """Lock a directory until the program that replaces this one ends; ranks do not lock it again.

    Raises:
        UsageError: see `lock`.
    """
    lock(run_dir)
    folder = Path(run_dir).resolve()
    os.set_inheritable(_locked[folder], True)  # noqa: FBT003
    os.environ[ranks.LOCK_FILE] = str(folder / LOCK)


def used_files(run_dir: Path) -> list[Path]:
    """Files of earlier runs, checkpoints first; empty if a run failed without a checkpoint."""
    checkpoint_paths = checkpoints(run_dir)
    if not checkpoint_paths and json_object(run_dir / RESULTS).get("error"):
        return []
    return checkpoint_paths + [
        path for path in training_files(run_dir) if path not in checkpoint_paths
    ]


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints that a command could resume or start from."""
    return sorted([*run_dir.glob("checkpoints/*.ckpt"), *run_dir.glob("*.ckpt")])


def training_files(run_dir: Path) -> list[Path]:
    """Files of an earlier training run that a new one would replace."""
    files: list[Path] = []
    for pattern in TRAINING_OUTPUTS:
        paths = sorted(run_dir.glob(pattern))
        files += [path for path in paths if path.is_symlink() or path.is_file()]
    return files


def is_finished(run_dir: Path) -> bool:
    """True if there is a results file that does not record an error."""
    return (run_dir / RESULTS).exists() and not json_object(run_dir / RESULTS).get("error")


def check_own(run_dir: Path, command: str, weights: str | None = None) -> None:
    """Refuse a directory whose outputs belong to another command or to other weights.

    Args:
        run_dir: the directory, which the same command may write into again.
        command: name of the command.
        weights: origin of the evaluated weights; None = do not compare the weights.

    Raises:
        UsedError: the directory contains checkpoints or results of another command, or results of
            other weights.
    """
    names = ["checkpoints/*"]
    if command != "ptq":
        names += ["quantized", "reconstruct", "search"]
    for name in names:
        paths = sorted(run_dir.glob(f"{name}.ckpt"))
        if paths:
            raise _already_used_error(run_dir, str(paths[0].relative_to(run_dir)))

    if not is_finished(run_dir):
        return
    results = json_object(run_dir / RESULTS)
    is_other_command = results.get("command") not in {None, command}
    has_other_weights = weights is not None and results.get("weights") not in (None, weights)
    if is_other_command or has_other_weights:
        owner = f"{results.get('command')}.py {results.get('weights') or ''}".rstrip()
        raise _already_used_error(run_dir, f"{RESULTS} of {owner}")


def _already_used_error(run_dir: Path, content: str) -> UsedError:
    return UsedError(f"run_dir={str(run_dir)!r} contains {content} already; choose another run_dir")


class RunDirState:
    """State of a run directory when a command begins.

    Args:
        run_dir: the directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._was_used = bool(used_files(run_dir))
        self._config = _file_stamp(run_dir / CONFIG)

    def has_begun(self) -> bool:
        """True if the run has now written its settings, which happens after they are checked."""
        return _file_stamp(self.run_dir / CONFIG) != self._config

    def may_record_error(self) -> bool:
        """True if the error of the run may be written as its results.

        The error must not replace a result, or be written next to files of another run.
        """
        return (self.has_begun() or not self._was_used) and not is_finished(self.run_dir)


def _file_stamp(path: Path) -> tuple[int, int] | None:
    """Return inode and time of a file, which change if it is replaced, or None if it is missing."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
