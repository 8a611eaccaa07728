"""How much of a training loop's time passes in its loader."""

from __future__ import annotations

import math
import os
import time

from lightning.pytorch import Trainer


class WaitClock:
    """Reads the clocks of the host alone: no device is waited for.

    On an accelerator the host runs ahead of the device until the queue of launches is full. From there on it is held up in launches
    while the device has work, so that what passes in the loader is what the device lacks.
    """

    def __init__(self) -> None:
        self._loader: object = None
        self._waited = self._since = self._paused = 0.0

    def restart(self, trainer: Trainer) -> None:
        """Count from now on."""
        self._loader = trainer.train_dataloader
        self._waited, self._since = getattr(self._loader, "waited_s", 0.0), time.perf_counter()

    def pause(self) -> None:
        """Leave out what follows: a validation."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Count again."""
        self._since += time.perf_counter() - self._paused

    def read(self, trainer: Trainer) -> tuple[float, float] | None:
        """Seconds in the loader, and their share of all (0 to 1); None for a loader that does not count them."""
        waited, seconds = getattr(trainer.train_dataloader, "waited_s", None), time.perf_counter() - self._since
        if waited is None or seconds <= 0:
            return None
        waited -= self._waited if trainer.train_dataloader is self._loader else 0.0
        return waited, min(waited / seconds, 1.0)


def advice(share: float, workers: int, processes: int = 1) -> str:
    """What to try when a loop waits for its data.

    Args:
        share: of the time that passes in the loader, 0 to 1.
        workers: loader processes now. So many keep up if decoding is shared out evenly: with w the share and n the processes, n / (1 - w),
            and from none w / (1 - w).
        processes: of the run on this machine, which share its cores.
    """
    cores = max(len(os.sched_getaffinity(0)) // processes, 1)
    enough = math.ceil((workers or share) / max(1 - share, 1 / (cores + 1)))
    if workers >= cores:
        return f"data.num_workers={workers} has all {cores} cores of a process at work"
    return f"try data.num_workers={min(max(enough, workers + 1), cores)}"
