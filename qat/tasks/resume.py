"""Going on with a run that was stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qat.callbacks.last import NAME
from qat.checkpoint import TRAINING, Checkpoint, read_checkpoint
from qat.errors import UsageError
from qat.files import remove_unfinished
from qat.lit.checkpoint_io import PREVIOUS
from qat.lit.csv_log import read_rows
from qat.spec import QuantRecipe
from qat.tasks.ranks import is_first

log = logging.getLogger(__name__)

# Groups of settings that shape a training. What a checkpoint holds of them, the run keeps.
_SHAPING = ("seed", "data", "loss", "optimizer", "scheduler", "trainer.max_epochs", "trainer.accumulate_grad_batches")
_KEPT = ("optimizer", "scheduler")
# How images come to the run changes nothing in them.
_INDIFFERENT = ("data.root", "data.num_workers", "data.in_memory", "data.memory_mb", "data.cache")


@dataclass(frozen=True)
class Resume:
    """Where a run goes on.

    Attributes:
        checkpoint: its last complete checkpoint.
        rows: of its `metrics.csv`; `LastCheckpoint` takes back those from behind the checkpoint.
    """

    checkpoint: Checkpoint
    rows: list[dict[str, str]]

    @property
    def path(self) -> str:
        """The file, for Lightning."""
        return str(self.checkpoint.path)


def find_resume(cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]) -> Resume | None:
    """What `resume` asks for: None to start, else the checkpoint to go on from.

    A `last.ckpt` that is gone or cannot be read gives way to the one before it, with a warning. What writes that were killed have left is
    deleted.

    Raises:
        UsageError: `resume` has another value than false, true and auto; there is nothing to go on from under `true`; or the run had
            another model or recipe.
    """
    if cfg.resume not in {True, False, "auto"}:
        raise UsageError(f"resume={cfg.resume!r}: allowed are false, true, auto")
    folder = Path(cfg.run_dir) / "checkpoints"
    if is_first():
        remove_unfinished([folder.parent, folder])
    found = [folder / name for name in (NAME, PREVIOUS[NAME]) if (folder / name).is_file()]
    if cfg.resume is False or (cfg.resume == "auto" and not found):
        return None
    if not found:
        raise UsageError(f"resume=true: run_dir={str(cfg.run_dir)!r} has no checkpoints/last.ckpt; resume=auto starts where there is none")
    if cfg.trainer.fast_dev_run:
        raise UsageError(
            f"trainer.fast_dev_run: resume={cfg.resume!r} goes on with {found[0]}, which a dry run leaves alone; set resume=false"
        )
    checkpoint = _read_first(found)
    _check_complete(checkpoint)
    _check_same(checkpoint, cfg, recipe, model_args)
    _check_epochs(checkpoint, cfg.trainer.max_epochs)
    _check_changes(cfg)
    log.info("resumed at step %d from %s", checkpoint.step or 0, checkpoint.path)
    # The first process may be writing the file by the time another would read it.
    rows = read_rows(Path(cfg.run_dir) / "metrics.csv") if is_first() else []
    return Resume(checkpoint, rows)


def _read_first(paths: list[Path]) -> Checkpoint:
    for path in paths[:-1]:
        try:
            return read_checkpoint(path, fmt="qat", setting="resume")
        except UsageError as error:
            log.warning("%s; going on from %s", error, paths[-1].name)
    if paths[-1].name != NAME and len(paths) == 1:
        log.warning("resume: %s is not there; going on from %s", paths[-1].with_name(NAME), paths[-1].name)
    return read_checkpoint(paths[-1], fmt="qat", setting="resume")


def check_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Raise `UsageError` unless the optimizer of a run that goes on is the one that it had: torch fails on it later, or mixes the two."""
    had = checkpoint.training.get("groups")
    groups = [(sorted(set(group) - {"params"}), len(group["params"])) for group in optimizer.state_dict()["param_groups"]]
    have = [(sorted({*keys, "initial_lr"}), count) for keys, count in groups]
    if had is None or [(sorted({*keys, "initial_lr"}), count) for keys, count in had] != have:
        raise UsageError(f"resume: {checkpoint.path} has another optimizer, or one of other parameters; use ckpt=PATH to start from it")


def _check_epochs(checkpoint: Checkpoint, max_epochs: int) -> None:
    done = checkpoint.training.get("epochs")
    if done is not None and done > max_epochs:
        raise UsageError(f"trainer.max_epochs={max_epochs}: {checkpoint.path} has {done} behind it; allowed are whole numbers from {done}")


def _check_changes(cfg: DictConfig) -> None:
    """Refuse settings that the run cannot take any more, and name others that are not those of the run so far: no curve would show it."""
    path = Path(cfg.run_dir) / "config.yaml"
    if not path.is_file():
        return
    had = OmegaConf.load(path)
    changed = {name: (old, new) for name, old, new in _changes(had, cfg) if not name.startswith(_INDIFFERENT)}
    kept = {name: pair for name, pair in changed.items() if name.startswith(_KEPT)}
    if kept:
        raise UsageError(
            f"{_listed(kept)}: a run that goes on keeps its optimizer and its schedule; ckpt=PATH in another run_dir starts a new one"
        )
    if not is_first():
        return
    if "trainer.max_epochs" in changed:
        log.warning(
            "resume: %s; the schedule of the learning rate stays as it was", _listed({"trainer.max_epochs": changed["trainer.max_epochs"]})
        )
    others = {name: pair for name, pair in changed.items() if name != "trainer.max_epochs"}
    if others:
        log.warning("resume: from here on with %s", _listed(others))


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}={new!r} (it had {old!r})" for name, (old, new) in changed.items())


def _changes(had: Any, has: DictConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings that shape a training and are not the same in two configs: name, value in either. One that only one of them has is none."""
    for name in _SHAPING:
        old, new = (_leaves(name, OmegaConf.select(config, name)) for config in (had, has))
        yield from ((key, old[key], new[key]) for key in old if key in new and old[key] != new[key])


def _leaves(name: str, node: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(plain, dict):
        return {key: value for part, within in plain.items() for key, value in _leaves(f"{name}.{part!s}", within).items()}
    return {name: plain}


def _check_complete(checkpoint: Checkpoint) -> None:
    for key, kind in TRAINING.items():
        found = checkpoint.training.get(key)
        if found is not kind:
            kinds = "nothing" if found is None else found.__name__
            raise UsageError(f"resume: {checkpoint.path} is no checkpoint that a run can go on from: {key} is {kinds}, not {kind.__name__}")


def _check_same(checkpoint: Checkpoint, cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]) -> None:
    """A run goes on with the net it had; anything else is a new run that starts from weights."""
    meta = checkpoint.meta or {}
    had_model = meta.get("model", {})
    if (had_model.get("name"), had_model.get("kwargs")) != (cfg.model.name, model_args):
        difference = f"holds {had_model}, not model {cfg.model.name} with {model_args}"
        raise UsageError(f"resume: {checkpoint.path} {difference}; use ckpt=PATH to start from it")
    # A knob that is newer than the file had its default.
    stored = {**QuantRecipe().to_dict(), **meta["recipe"]} if meta.get("recipe") else {"name": "fp"}
    wanted = {"name": "fp"} if recipe.name == "fp" else recipe.to_dict()
    differ = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differ:
        raise UsageError(f"resume: {checkpoint.path} has another recipe (quant: {', '.join(differ)}); use ckpt=PATH to start from it")
