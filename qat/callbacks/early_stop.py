"""Early stopping of runs that go on with another patience."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import callbacks
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's callback, whose patience is that of the settings: in a run that goes on Lightning's has the one it was stopped with."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the state of the run; one that had lost its patience goes on if it has more now."""
        super().load_state_dict({**state_dict, "patience": self.patience})
        if self.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED and self.wait_count < self.patience:
            self.stopping_reason, self.stopping_reason_message, self.stopped_epoch = EarlyStoppingReason.NOT_STOPPED, None, 0
