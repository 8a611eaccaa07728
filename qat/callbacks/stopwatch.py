"""What a run has trained for, with what it trained for before it was resumed."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Stopwatch(Callback):
    """Measures the time of training. Not Lightning's `Timer`: where there is one, `Trainer(max_time=...)` is ignored.

    Attributes:
        earlier_seconds: of training behind the checkpoint that a run went on from, 0 of others. What was lost and done again is left out.
    """

    def __init__(self) -> None:
        self.earlier_seconds = 0.0
        self._seconds = 0.0
        self._began: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._seconds, self._began = self._here(), None

    def _here(self) -> float:
        """Seconds of training in this process."""
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training, as Lightning's timer writes them."""
        return {"time_elapsed": {"train": self.earlier_seconds + self._here()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.earlier_seconds = float(state_dict["time_elapsed"]["train"])
