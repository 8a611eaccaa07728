"""A run that waits within a step for a signal."""

import os
import time
from pathlib import Path

from lightning.pytorch import Callback

from qat.launch import signals

LONGEST_S = 240


class Pace(Callback):
    """Says in the run directory, by the number of its process, that a step has begun, and ends it when a signal has arrived.

    Args:
        step: which; none where the run has less.
    """

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        (Path(trainer.default_root_dir) / f"waiting-{trainer.global_rank}").write_text(
            str(os.getpid())
        )
        deadline = time.monotonic() + LONGEST_S
        while not signals.received_signal() and time.monotonic() < deadline:
            time.sleep(0.02)
