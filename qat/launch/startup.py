"""The first import of each command: Ctrl-C ends it in one line from here on, and a rank ends with its launcher. Imports nothing heavy."""

import contextlib
import ctypes
import os
import resource
import signal

from qat.launch import signals
from qat.launch.ranks import LAUNCHER

MOST_OPEN_FILES = 65536
PR_SET_PDEATHSIG = 1

# Not where Ctrl-C is ignored (a job in the background of a script), or somebody's own handler takes it.
with contextlib.suppress(ValueError):  # not the main thread
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signals.end_at_once)
# Of torchrun, which may be killed, and may have been by now. Only Linux has it.
if "TORCHELASTIC_RUN_ID" in os.environ:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Loader processes that this rank spawns have another parent.
    if os.environ.pop(LAUNCHER, None) not in {None, str(os.getppid())}:
        os._exit(1)
# Loader processes hand over tensors as open files, and the usual 1024 are soon gone.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
_wanted = MOST_OPEN_FILES if _hard == resource.RLIM_INFINITY else min(_hard, MOST_OPEN_FILES)
if resource.RLIM_INFINITY != _soft < _wanted:
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (_wanted, _hard))
# Turns of a loop in which a thread of GNU's OpenMP waits for the others before it sleeps: some 0.1 ms. Its own 300,000 take a core from
# whatever else wants it, the thread that all wait for included.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"
