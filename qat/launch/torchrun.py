"""`torch.distributed.run` as a script: a signal gives its exit code, a rank that a signal ended the table of ranks, neither a traceback.

It holds the lock of the run directory as long as a rank lives.
"""

import contextlib
import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def remove_lock() -> None:
    """Remove the lock file that came with this process; the lock itself goes with it."""
    with contextlib.suppress(KeyError, OSError):
        os.unlink(os.environ["QAT_LOCK"])  # `ranks.HELD`; qat is not always on the path here


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # ranks write their own lines, also before they exit with 1
    try:
        main()
    except ChildFailedError as failed:
        sys.exit(1 if failed.get_first_failure()[1].exitcode == 1 else str(failed))
    except SignalException as stop:
        remove_lock()
        os._exit(128 + stop.sigval)
    finally:
        remove_lock()
