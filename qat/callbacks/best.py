"""`best.ckpt`: Lightning's ModelCheckpoint, whose record after a kill is that of the file that is there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from qat.errors import UsageError
from qat.utils.files import read_torch
from qat.utils.validate import check_text

log = logging.getLogger(__name__)
_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint of the best epoch.

    A resumed run goes on with the record of the file itself, not with that of `last.ckpt`, which is older where a kill came in between; the
    run's directory may have been moved, upon which Lightning would forget the best score. Where the file is gone or damaged the record is
    forgotten, with a warning: the best of the epochs to come is kept.

    Args:
        monitor: name of what decides, as it is logged.
        mode: `max` | `min`.
        save_top_k: 1; several would take turns under one name.
        filename: of the file, without its suffix; None = Lightning's, made of epoch and step.
        **options: of Lightning's.

    Raises:
        UsageError: another number of files, a name that is no text, or the highest loss.
    """

    def __init__(
        self, monitor: str = "val/top1", mode: str = "max", save_top_k: int = 1, filename: str | None = None, **options: Any
    ) -> None:
        if save_top_k != 1:
            raise UsageError(f"callbacks.best.save_top_k={save_top_k!r}: must be 1; callbacks.best=null keeps none")
        if filename is not None:
            check_text("callbacks.best.filename", filename)
        if "loss" in monitor and mode != "min":
            raise UsageError(f"callbacks.best.mode={mode!r}: the best {monitor} is the lowest; must be min")
        super().__init__(monitor=monitor, mode=mode, save_top_k=save_top_k, filename=filename, **options)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the step of the best epoch."""
        return {**super().state_dict(), "step": self._last_global_step_saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the record."""
        state = self._settled(state_dict)
        if state is None:
            return
        super().load_state_dict(state)
        self.current_score = state["current_score"]
        self._last_global_step_saved = state.get("step", self._last_global_step_saved)

    def _settled(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """The state that fits the file that is there; None where there is none that can be read."""
        if not state["best_model_path"]:
            return {**state, "dirpath": self.dirpath}
        best = self._here(state["best_model_path"])
        try:
            own = read_torch(best)["callbacks"][self.state_key]
        except Exception as error:
            why = (isinstance(error, OSError) and error.strerror) or "it cannot be read"
            log.warning("resume: %s: %s; the best epoch is chosen among those to come", best, why)
            return None
        state = own if own.get("step", -1) > state.get("step", -1) else state
        paths = {key: self._here(state[key]) for key in _PATHS}
        scores = {self._here(path): score for path, score in state["best_k_models"].items()}
        return {**state, **paths, "best_k_models": scores, "dirpath": self.dirpath}

    def _here(self, path: str) -> str:
        """A file of the record where the run is now."""
        return str(Path(self.dirpath or "") / Path(path).name) if path else path
