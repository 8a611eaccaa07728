"""What compilation takes, and whether it stays at one."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from qat.lit.compiled import n_graphs

log = logging.getLogger(__name__)

AGAIN = "compiled again in a %s step, in %.0f s: something that the graph was made for has changed; TORCH_LOGS=recompiles names it"


class CompileWatch(Callback):
    """Says how long the first training step and the first validation took to compile, and warns once if graphs are compiled later on."""

    def __init__(self) -> None:
        self._ready: set[str] = set()
        self._began, self._graphs, self._warned = 0.0, 0, False

    def _begin(self) -> None:
        self._began, self._graphs = time.perf_counter(), n_graphs()

    def _end(self, stage: str) -> None:
        graphs, seconds = n_graphs() - self._graphs, time.perf_counter() - self._began
        if graphs and stage not in self._ready:
            log.info("%s step: compiled in %.0f s: %d graph%s", stage, seconds, graphs, "s" if graphs > 1 else "")
            self._ready.add(stage)
        elif graphs and not self._warned:
            self._warned = True
            log.warning(AGAIN, stage, seconds)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin to watch."""
        self._begin()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """The backward pass and the optimizer's step are over."""
        self._end("training")

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin to watch."""
        self._begin()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Forward is all there is."""
        self._end("validation")
