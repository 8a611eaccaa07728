"""`torch.distributed.run` as a script: a signal gives its exit code, a rank that fails the table of ranks, neither a traceback."""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # ranks write their own lines
    try:
        main()
    except ChildFailedError as failed:
        sys.exit(str(failed))
    except SignalException as stop:
        os._exit(128 + stop.sigval)
