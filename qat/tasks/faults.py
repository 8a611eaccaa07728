"""Training that goes back to its last checkpoint when the numbers fail it."""

from __future__ import annotations

import logging

from lightning.pytorch import Trainer

from qat.callbacks import FaultGuard, RollBack
from qat.checkpoint import read_checkpoint
from qat.data import ImageData
from qat.lit import QATModule

log = logging.getLogger(__name__)


def fit(trainer: Trainer, module: QATModule, data: ImageData, ckpt_path: str | None = None) -> None:
    """`trainer.fit`, again and again from `last.ckpt` while `FaultGuard` asks for it; it counts, and stops a run that fails too often.

    Weights, optimizer, schedule, callbacks, place in the data and rows of `metrics.csv` are those of the checkpoint, as when a run is
    resumed.

    Args:
        trainer: with its callbacks.
        module: what is trained.
        data: its data.
        ckpt_path: where a resumed run goes on.

    Raises:
        UsageError: a fault ends the run.
    """
    for guard in (one for one in trainer.callbacks if isinstance(one, FaultGuard)):  # type: ignore[attr-defined]
        guard.check(trainer)
    while True:
        try:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        except RollBack as back:
            ckpt_path = str(back.path)
            # Lightning would begin with a reset of what the last fit logged, the epoch's means among it, which come from the checkpoint.
            trainer.fit_loop.epoch_loop._results.clear()
            log.warning("rolled back to step %d: %s", read_checkpoint(back.path).step or 0, back.fault)
        else:
            return
