"""A progress bar where somebody looks at it."""

from __future__ import annotations

import os
import sys

from lightning.pytorch.callbacks import Callback, RichProgressBar

NO_BAR = "QAT_NO_PROGRESS_BAR"  # set by the jobs of a sweep that run side by side


def terminal_progress(refresh_rate: int = 10) -> Callback:
    """Lightning's rich bar with time elapsed and left; none where the output is no terminal, or jobs share it.

    Args:
        refresh_rate: steps between refreshes; each one waits for the device.
    """
    return RichProgressBar(refresh_rate=refresh_rate, leave=False) if sys.stdout.isatty() and NO_BAR not in os.environ else Callback()
