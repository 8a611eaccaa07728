"""Set up this process on import, which is the first step of each command.

Ctrl-C then ends the process with one line, and a rank ends with its launcher. This module imports
nothing heavy.
"""

import contextlib
import ctypes
import os
import resource
import signal

from qat.launch import signals
from qat.launch.ranks import LAUNCHER

MAX_OPEN_FILES = 65536
PR_SET_PDEATHSIG = 1


def _handle_ctrl_c() -> None:
    # Replace only Python's own handler: Ctrl-C stays ignored if a script runs in the background,
    # and a caller may have set a handler.
    with contextlib.suppress(ValueError):  # outside the main thread
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signals.end_immediately)


def _end_with_launcher() -> None:
    """End this rank when torchrun ends, or now if the torchrun of qat has already ended."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Remove the variable, because loader processes that this rank spawns have another parent.
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is not None and launcher != str(os.getppid()):
        os._exit(1)


def _allow_open_files() -> None:
    """Raise the limit on open files, often 1024: loader processes send tensors as files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        limit = min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _shorten_spinning() -> None:
    """Let waiting threads of GNU's OpenMP sleep soon, unless the user has set this.

    The default, a loop of 300,000 iterations, occupies a core that the slowest thread may need.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "10000"


_handle_ctrl_c()
_end_with_launcher()
_allow_open_files()
_shorten_spinning()
