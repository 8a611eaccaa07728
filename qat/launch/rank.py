"""One process of a job that has several: `python -m qat.launch.rank`, started by `qat.launch.ranks` and told by it what to do."""

from __future__ import annotations

from qat.tasks import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import json
import logging
import os
import sys
import threading
import time
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log

from qat.launch import ranks
from qat.tasks import cli

TICK_S = 0.5


def main() -> None:
    """Run the task, and send what it returns to whoever started this process."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    task, cfg = ranks.told(sys.stdin.read())
    hydra_cfg: Any = HydraConfig.get() if HydraConfig.initialized() else None
    if ranks.is_first() and hydra_cfg is not None:
        configure_log(hydra_cfg.job_logging, hydra_cfg.verbose)
    else:
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
    result = cli.run(task, cfg)
    _send(result)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: it would wait for the others, or go on without anyone's knowledge."""
    while os.getppid() == parent:
        time.sleep(TICK_S)
    os._exit(1)


def _send(result: Any) -> None:
    pipe = int(os.environ[ranks.OUTCOME])
    if pipe >= 0:
        with os.fdopen(pipe, "w", encoding="utf-8") as out:
            json.dump(result, out)


if __name__ == "__main__":
    main()
