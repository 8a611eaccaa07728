"""A progress bar where somebody looks at it."""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar

NO_BAR = "QAT_NO_PROGRESS_BAR"  # set by the jobs of a sweep that run side by side


class EpochBar(RichProgressBar):
    """Lightning's rich bar, counting epochs from 1 as the log does, in one line of 80 columns: the log has what a validation gives."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The loss of the step."""
        loss = super().get_metrics(trainer, pl_module).get("train/loss_step")
        return {} if loss is None else {"loss": loss}

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        text = f"epoch {current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")
        return text.ljust(len(self.validation_description))


def terminal_progress(refresh_rate: int = 10) -> Callback:
    """A bar with time elapsed and left; none where the output is no terminal, or jobs share it.

    Args:
        refresh_rate: steps between refreshes; each one waits for the device.
    """
    return EpochBar(refresh_rate=refresh_rate, leave=False) if sys.stdout.isatty() and NO_BAR not in os.environ else Callback()
