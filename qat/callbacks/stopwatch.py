"""What a run has trained for, with what it trained for before it was resumed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Timer


class Stopwatch(Timer):
    """Lightning's timer without a limit. A class of its own, as two of one class cannot be told apart in a checkpoint.

    Attributes:
        earlier_seconds: of training behind the checkpoint that a run went on from, 0 of others. What was lost and done again is left out.
    """

    def __init__(self) -> None:
        super().__init__(duration=None)
        self.earlier_seconds = 0.0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self.earlier_seconds = self.time_elapsed()
