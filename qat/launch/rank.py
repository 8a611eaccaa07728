"""One process of a job that has several: `python -m qat.launch.rank MODULE:FUNCTION`, started by `qat.launch.ranks.supervise`."""

from __future__ import annotations

from qat.launch import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import importlib
import os
import sys
import threading
import time
from pathlib import Path

from qat.launch import ranks

TICK_S = 0.5


def main() -> None:
    """Call the function with the text of the job."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function)(Path(os.environ[ranks.EXCHANGE], ranks.JOB).read_text(encoding="utf-8"))


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: it would wait for the others, or go on without anyone's knowledge."""
    while os.getppid() == parent:
        time.sleep(TICK_S)
    os._exit(1)


if __name__ == "__main__":
    main()
