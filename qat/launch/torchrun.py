"""Run `torch.distributed.run` as a script without tracebacks.

After signal N, the script exits with 128 + N. If the first failed rank exited with 1, that rank has
logged its error, so the script prints nothing; otherwise, the script prints torchrun's list of
failed ranks. The run directory stays locked as long as a rank lives.
"""

import contextlib
import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def remove_lock() -> None:
    """Remove the lock file of this process; the lock ends with the process."""
    with contextlib.suppress(KeyError, OSError):
        os.unlink(os.environ["QAT_LOCK"])  # `ranks.LOCK_FILE`; qat may not be importable here


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # ranks log their own errors before they exit with 1
    try:
        main()
    except ChildFailedError as failed:
        sys.exit(1 if failed.get_first_failure()[1].exitcode == 1 else str(failed))
    except SignalException as stop:
        remove_lock()
        os._exit(128 + stop.sigval)
    finally:
        remove_lock()
