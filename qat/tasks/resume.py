"""Going on with a run that was stopped."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qat.checkpoint import Checkpoint, read_checkpoint
from qat.errors import UsageError
from qat.lit.csv_log import read_rows
from qat.spec import QuantRecipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """Where a run goes on.

    Attributes:
        checkpoint: its last complete checkpoint.
        rows: what its `metrics.csv` said up to there.
    """

    checkpoint: Checkpoint
    rows: list[dict[str, str]]

    @property
    def path(self) -> str:
        """The file, for Lightning."""
        return str(self.checkpoint.path)


def find_resume(cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]) -> Resume | None:
    """What `resume` asks for: None to start, else the checkpoint to go on from.

    A `last.ckpt` that cannot be read gives way to the one before it, with a warning.

    Raises:
        UsageError: `resume` has another value than false, true and auto; there is nothing to go on from under `true`; or the run had
            another model or recipe.
    """
    if cfg.resume not in {True, False, "auto"}:
        raise UsageError(f"resume={cfg.resume!r}: allowed are false, true, auto")
    folder = Path(cfg.run_dir) / "checkpoints"
    found = [folder / name for name in ("last.ckpt", "last.prev.ckpt") if (folder / name).is_file()]
    if cfg.resume is False or (cfg.resume == "auto" and not found):
        return None
    if not found:
        raise UsageError(f"resume=true: run_dir={str(cfg.run_dir)!r} has no checkpoints/last.ckpt; resume=auto starts where there is none")
    checkpoint = _read_first(found)
    _check_same(checkpoint, cfg, recipe, model_args)
    log.info("resumed at step %d from %s", checkpoint.step or 0, checkpoint.path)
    return Resume(checkpoint, read_rows(Path(cfg.run_dir) / "metrics.csv", before_step=checkpoint.step or 0))


def _read_first(paths: list[Path]) -> Checkpoint:
    for path in paths[:-1]:
        try:
            return read_checkpoint(path, fmt="qat", setting="resume")
        except UsageError as error:
            log.warning("%s; going on from %s", error, paths[-1].name)
    return read_checkpoint(paths[-1], fmt="qat", setting="resume")


def _check_same(checkpoint: Checkpoint, cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]) -> None:
    """A run goes on with the net it had; anything else is a new run that starts from weights."""
    meta = checkpoint.meta or {}
    had_model = meta.get("model", {})
    if (had_model.get("name"), had_model.get("kwargs")) != (cfg.model.name, model_args):
        difference = f"holds {had_model}, not model {cfg.model.name} with {model_args}"
        raise UsageError(f"resume: {checkpoint.path} {difference}; use ckpt=PATH to start from it")
    stored: dict[str, Any] = meta.get("recipe") or {"name": "fp"}
    wanted = {"name": "fp"} if recipe.name == "fp" else recipe.to_dict()
    differ = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differ:
        raise UsageError(f"resume: {checkpoint.path} has another recipe (quant: {', '.join(differ)}); use ckpt=PATH to start from it")
