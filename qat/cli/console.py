"""Log lines that live in peace with a progress bar."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from qat.utils.text import printable

log = logging.getLogger(__name__)


class TerminalHandler(logging.StreamHandler):
    """Writes to what `sys.stdout` is when a line comes: a live progress bar puts itself there and prints lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The present standard output."""
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:
        """Whoever read what a run says may stop doing so (`| head`); the run goes on."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # what is still in the buffer is flushed at the end of the process
        os.close(nowhere)
        log.warning("standard output was closed; the run goes on")


class PlainFormatter(logging.Formatter):
    """Lets no name of a file or class reach a terminal as a command."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, printable."""
        return printable(super().format(record))


class NumberedFormatter(PlainFormatter):
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
