"""The first import of each command. From here on Ctrl-C ends it in one line, `qat.cli.entry` takes over; imports nothing heavy."""

import contextlib
import os
import resource
import signal
import tempfile
import threading
from pathlib import Path

from qat.launch import signals

MOST_OPEN_FILES = 65536
# Turns of a loop in which a thread of GNU's OpenMP waits for the others before it sleeps: some 0.1 ms. Its own 300,000 take a core from
# whatever else wants it, the thread that all wait for included. docs/performance.md#threads
SPIN_COUNT = 10_000


def _stand_in_home() -> None:
    """A user id without an account (`docker run -u 12345`) has no home and no name: matplotlib, torch and pathlib raise without them."""
    uid = os.getuid()
    if not os.path.isabs(os.path.expanduser("~")):
        home = Path(tempfile.gettempdir()) / f"qat-home-{uid}"
        with contextlib.suppress(OSError):
            home.mkdir(mode=0o700)
        # One of that name may be somebody else's.
        is_ours = home.is_dir() and not home.is_symlink() and home.stat().st_uid == uid
        os.environ["HOME"] = str(home) if is_ours else tempfile.mkdtemp(prefix="qat-home-")
        os.environ.setdefault("USER", str(uid))


def _allow_open_files() -> None:
    """Take what the system allows: loader processes hand over tensors as open files, and the usual 1024 are soon gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _wait_briefly() -> None:
    """To be called before torch is loaded. Who has said how threads wait is not contradicted."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _drop_lone_rank() -> None:
    """A number without the size of a run is left over from another program: Lightning would take this for a process that writes nothing."""
    if not os.environ.keys() & {"LOCAL_RANK", "WORLD_SIZE"}:
        os.environ.pop("RANK", None)


# Not where somebody has Ctrl-C ignored (a job in the background of a script), or takes it himself.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signals.end_at_once)
_stand_in_home()
_allow_open_files()
_wait_briefly()
_drop_lone_rank()
