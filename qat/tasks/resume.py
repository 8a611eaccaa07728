"""Going on with a run that was stopped."""

from __future__ import annotations

import logging
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from qat.callbacks.last import NAME
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.ranks import is_first
from qat.launch.run_dir import UsedError
from qat.lit.checkpoint_io import PREVIOUS
from qat.model.checkpoint import TRAINING, Checkpoint, read_checkpoint
from qat.spec import QuantRecipe
from qat.tasks import compare
from qat.utils.bounds import read_yaml
from qat.utils.files import remove_unfinished

log = logging.getLogger(__name__)

# What a checkpoint holds of these, the run keeps.
_KEPT = ("optimizer.", "scheduler.")
# Compared with the net in the checkpoint itself.
_OWN_CHECK = ("model.args", "model.name", "quant.")
# What changes the number of steps in an epoch; a schedule by steps was laid out for those that the run began with.
_STEPS = ("trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches", "trainer.limit_train_batches", "data.batch_size")


def find_resume(cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]) -> Checkpoint | None:
    """What `resume` asks for: None to start, else the checkpoint to go on from.

    A `last.ckpt` that is gone or cannot be read gives way to the one before it, with a warning. What writes that were killed have left is
    deleted.

    Raises:
        UsageError: there is nothing to go on from under `true`, or the run had another model or recipe.
    """
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
    _check_changes(checkpoint, cfg)
    log.info("resumed at step %d from %s", checkpoint.step or 0, checkpoint.path)
    return checkpoint


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
        raise UsageError(f"trainer.max_epochs={max_epochs}: {checkpoint.path} has {done} behind it; must be an integer of at least {done}")


def _check_changes(checkpoint: Checkpoint, cfg: DictConfig) -> None:
    """Refuse settings that the run cannot take any more, and name all others that are not those of the run: no curve would show it."""
    had = _settings_of(checkpoint, Path(cfg.run_dir) / "config.yaml")
    if had is None:
        return
    changed = [found for found in compare.differences(had, compare.compared(cfg)) if not found[0].startswith(_OWN_CHECK)]
    kept = [f"{name}={new!r} (it had {old!r})" for name, old, new in changed if name.startswith(_KEPT)]
    if kept:
        raise UsageError(
            f"{', '.join(kept)}: a run that goes on keeps its optimizer and its schedule; ckpt=PATH in another run_dir starts a new one"
        )
    for found in changed if is_first() else ():
        note = "; the schedule of the learning rate stays as it was" if found[0] == "trainer.max_epochs" else ""
        if found[0] in _STEPS and cfg.scheduler.interval == "step":
            note = "; the learning rate keeps the schedule that was laid out for the old number of steps"
        log.warning("resume: %s%s", compare.in_words(found), note)


def _settings_of(checkpoint: Checkpoint, path: Path) -> dict[str, Any] | None:
    """What the run has been trained with so far: as its checkpoint says, or its directory where an older version wrote the checkpoint."""
    held = (checkpoint.meta or {}).get("run", {}).get("settings")
    if isinstance(held, dict):
        return held
    try:
        held = compare.of_file(read_yaml(path)[0])
        why = "it is no config of a run"
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
    if held is None and is_first():
        log.warning(
            "resume: %s does not hold the settings of its run, and %s cannot be read (%s): none are compared", checkpoint.path, path, why
        )
    return held


def check_data(cfg: DictConfig, checkpoint: Checkpoint, data: ImageData) -> None:
    """Raise `UsageError` unless a run goes on with its own classes and images.

    `allow_changed_data=true` lets other images pass, with a warning. What an older version wrote says nothing of images.
    """
    meta = checkpoint.meta or {}
    had, has = meta.get("classes"), data.named_classes()
    if had and has and list(had) != has:
        number, old, new = next((n, a, b) for n, (a, b) in enumerate(zip_longest(had, has)) if a != b)
        raise UsageError(
            f"data: class {number} must be {old!r} as in {checkpoint.path}, is {new!r}; ckpt=PATH in another run_dir starts anew"
        )
    prints = meta.get("run", {}).get("images")
    if not isinstance(prints, dict):
        return
    now = data.fingerprints()
    changed = [split for split in dict.fromkeys([*prints, *now]) if prints.get(split) != now.get(split)]
    if not changed:
        return
    what = f"data: the images of {', '.join(changed)} are not those that {checkpoint.path} was trained with"
    if not cfg.allow_changed_data:
        raise UsageError(f"{what}; allow_changed_data=true goes on with them, ckpt=PATH in another run_dir starts anew")
    if is_first():
        log.warning("resume: %s (allow_changed_data=true)", what)


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
    # A knob that is newer than the file had its default; what rules mean and how steps are learned stays as it was.
    newer = {**QuantRecipe().to_dict(), "rule_bits": recipe.rule_bits, "steps": recipe.steps}
    stored = {**newer, **meta["recipe"]} if meta.get("recipe") else {"name": "fp"}
    wanted = {"name": "fp"} if recipe.name == "fp" else recipe.to_dict()
    differ = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differ:
        raise UsageError(f"resume: {checkpoint.path} has another recipe (quant: {', '.join(differ)}); use ckpt=PATH to start from it")


def outputs_to_replace(cfg: DictConfig) -> list[Path]:
    """What a new run in a used directory replaces, once everything is checked and a `ckpt` from there is in memory.

    Raises:
        UsedError: there are files of another run, and they may not be overwritten.
    """
    run_dir = Path(cfg.run_dir)
    used = outputs.used(run_dir)
    checkpoints = [path.name for path in outputs.checkpoints(run_dir)]
    if checkpoints and cfg.trainer.fast_dev_run:
        raise UsedError(
            f"trainer.fast_dev_run: run_dir={str(run_dir)!r} holds {checkpoints[0]}, which a dry run leaves alone; choose another run_dir"
        )
    # A run that was killed before its first last.ckpt has nothing to go on from.
    unsaved = checkpoints == ["best.ckpt"] or not (checkpoints or outputs.is_finished(run_dir))
    if used and not (cfg.overwrite or (cfg.resume == "auto" and unsaved)):
        raise UsedError(f"run_dir={str(run_dir)!r} holds {used[0].name} already; choose another run_dir or set overwrite=true")
    return outputs.of_training(run_dir)
