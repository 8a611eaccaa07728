"""Log lines that live in peace with a progress bar."""

from __future__ import annotations

import logging
import sys
from typing import TextIO


class TerminalHandler(logging.StreamHandler):
    """Writes to what `sys.stdout` is when a line comes: a live progress bar puts itself there and prints lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The present standard output."""
        return sys.stdout


class NumberedFormatter(logging.Formatter):
    """Puts the number of a job in front of each line: `#3 epoch 1/10 ...`. Several jobs write to one terminal.

    Args:
        number: of the job in its sweep.
    """

    def __init__(self, number: int) -> None:
        super().__init__("%(message)s")
        self.mark = f"#{number} "

    def format(self, record: logging.LogRecord) -> str:
        """All lines of a message, marked."""
        return "\n".join(self.mark + line for line in super().format(record).splitlines())
