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
