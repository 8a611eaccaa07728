"""Resume a stopped run, or begin a new run in a used directory.

Before a run is resumed, its settings, model, data, teacher and optimizer are compared with its
checkpoint. `lit/module.py` checks that a run with averaged weights is resumed with a callback that
averages, `data/sampler.py` that the global batch stays the same within an epoch. Lightning restores
weights, optimizer, schedule, loops and callbacks; `lit/loggers.py` deletes rows of `metrics.csv`
that will be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qat.callbacks.last import FILE_NAME
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.ranks import is_first
from qat.launch.run_dir import UsedError
from qat.lit.strategies import PREVIOUS_NAMES
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.spec import QuantRecipe

log = logging.getLogger(__name__)

# Settings that do not change results, such as paths and logs. `comparable_settings` returns all
# other settings.
NOT_COMPARED = {
    "run_dir",
    "sweep_dir",
    "resume",
    "overwrite",
    "report",
    "allow_changed_data",
    "logger",
    "debug",
    "defaults",
    "follows",
    "checkpoint.every_n_steps",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "data.root",
    "data.num_workers",
    "data.memory_mb",
    "callbacks.last",
    "callbacks.progress",
    "callbacks.epoch_log",
    "callbacks.throughput",
    "callbacks.learning_rate",
    "callbacks.preemption",
    "callbacks.finite",
}
# Prefixes of settings that must not change.
_FIXED_PREFIXES = ("optimizer.", "scheduler.")
# Prefixes of settings that are not compared, because the model itself is compared.
_MODEL_PREFIXES = ("model.args", "model.name", "quant.")
# Settings that change the number of steps. The schedule keeps the number from the start of the run.
_STEP_SETTINGS = (
    "trainer.max_epochs",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "trainer.limit_train_batches",
    "data.batch_size",
)
_UNSET = "not set"


def find_resume(
    cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]
) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None for a new run.

    If `last.ckpt` is missing or cannot be read, `last.prev.ckpt` is used, with a warning.

    Raises:
        UsageError: with `resume=true`, there is no checkpoint; the checkpoint cannot be read or
            resumed; the run had another model, recipe, optimizer or schedule, or more epochs; or
            a dry run would resume it.
    """
    folder = Path(cfg.run_dir) / "checkpoints"
    candidates = [folder / name for name in (FILE_NAME, PREVIOUS_NAMES[FILE_NAME])]
    paths = [path for path in candidates if path.is_file()]
    if cfg.resume is False or (cfg.resume == "auto" and not paths):
        return None
    if not paths:
        raise UsageError(
            f"resume=true: run_dir={str(cfg.run_dir)!r} has no checkpoints/last.ckpt; "
            "use resume=auto to start a new run in that case"
        )
    if cfg.trainer.fast_dev_run:
        raise UsageError(
            f"trainer.fast_dev_run: resume={cfg.resume!r} would change {paths[0]}; "
            "a dry run must have resume=false"
        )
    checkpoint = _read_checkpoint(paths)
    if not checkpoint.training:
        raise UsageError(
            f"resume: {checkpoint.path} is not a training checkpoint; use ckpt=PATH instead"
        )
    _check_model(checkpoint, cfg.model.name, recipe, model_args)
    epochs = checkpoint.training["epochs"]
    if epochs > cfg.trainer.max_epochs:
        raise UsageError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: {checkpoint.path} was already trained "
            f"for {epochs} epochs; must be at least {epochs}"
        )
    reason = (
        "a resumed run keeps its optimizer and schedule; "
        "use ckpt=PATH in another run_dir to start a new run"
    )
    stored_settings = (checkpoint.meta or {}).get("run", {}).get("settings")
    compare_settings(stored_settings, comparable_settings(cfg), _FIXED_PREFIXES, reason)
    log.info("resumed at training step %d from %s", checkpoint.step or 0, checkpoint.path)
    return checkpoint


def _read_checkpoint(paths: list[Path]) -> Checkpoint:
    if paths[0].name != FILE_NAME:
        log.warning(
            "resume: %s is missing; resuming from %s", paths[0].with_name(FILE_NAME), paths[0].name
        )
    for path in paths[:-1]:
        try:
            return read_checkpoint(path, fmt="qat", setting="resume")
        except UsageError as error:
            log.warning("%s; resuming from %s", error, paths[-1].name)
    return read_checkpoint(paths[-1], fmt="qat", setting="resume")


def _check_model(
    checkpoint: Checkpoint, model_name: str, recipe: QuantRecipe, model_args: dict[str, Any]
) -> None:
    """Check that a checkpoint contains the model and recipe of the config."""
    meta = checkpoint.meta or {}
    hint = "use ckpt=PATH to start from it"
    model = meta.get("model", {})
    if (model.get("name"), model.get("kwargs")) != (model_name, model_args):
        raise UsageError(
            f"resume: {checkpoint.path} contains {model}, "
            f"not model {model_name} with {model_args}; {hint}"
        )
    # If an older file lacks a setting, the run had the default; `rule_bits` and `steps` are assumed
    # to be those of the present recipe.
    assumed_values = {
        **QuantRecipe().to_dict(),
        "rule_bits": recipe.rule_bits,
        "steps": recipe.steps,
    }
    stored_recipe: dict[str, Any] = {"name": "fp"}
    if meta.get("recipe"):
        stored_recipe = {**assumed_values, **meta["recipe"]}
    own_recipe: dict[str, Any] = {"name": "fp"}
    if recipe.name != "fp":
        own_recipe = recipe.to_dict()
    changed_names = []
    # Offsets are read from the checkpoint, so their initial values do not count.
    for key in sorted((stored_recipe.keys() | own_recipe.keys()) - {"offset_init"}):
        if stored_recipe.get(key) != own_recipe.get(key):
            changed_names.append(key)
    if changed_names:
        raise UsageError(
            f"resume: {checkpoint.path} has another recipe (quant: {', '.join(changed_names)}); "
            f"{hint}"
        )


def compare_settings(
    stored_settings: dict[str, Any] | None,
    current_settings: dict[str, Any],
    fixed_prefixes: tuple[str, ...],
    reason: str,
) -> None:
    """Refuse changes to settings that must not change, and warn about other changes.

    Settings of the model are left out, because the model itself is compared.

    Args:
        stored_settings: settings that the run had so far, nested or by name; None = unknown.
        current_settings: settings of the resumed run, see `comparable_settings`.
        fixed_prefixes: prefixes of the names of settings that must not change.
        reason: reason why these settings must not change, for the message.

    Raises:
        UsageError: a setting that must not change was changed.
    """
    if stored_settings is None:
        return
    old_settings = dict(_flatten(stored_settings))
    changed_names = []
    for name in {**old_settings, **current_settings}:
        is_changed = old_settings.get(name, _UNSET) != current_settings.get(name, _UNSET)
        if is_changed and not name.startswith(_MODEL_PREFIXES):
            changed_names.append(name)
    refusals = []
    for name in changed_names:
        if name.startswith(fixed_prefixes):
            value = current_settings.get(name, _UNSET)
            refusals.append(f"{name}={value!r} (the run had {old_settings.get(name, _UNSET)!r})")
    if refusals:
        raise UsageError(f"{', '.join(refusals)}: {reason}")
    if not is_first():
        return
    for name in changed_names:
        note = "; the learning rate follows the original schedule" if name in _STEP_SETTINGS else ""
        old_value = old_settings.get(name, _UNSET)
        log.warning(
            "resume: %s was %r, is %r%s", name, old_value, current_settings.get(name, _UNSET), note
        )


def comparable_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings that affect a run's result, by name, as plain data for its checkpoints."""
    settings = {}
    for name, value in _flatten(OmegaConf.to_container(cfg, resolve=True)):
        is_plain = value is None or type(value) in {bool, int, float, str, list}
        settings[name] = value if is_plain else str(value)
    return settings


def _flatten(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value of each setting to compare; settings of older checkpoints are nested."""
    if name in NOT_COMPARED:
        return
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def check_data(checkpoint: Checkpoint, data: ImageData, *, allow_changed_data: bool) -> None:
    """Check that a run is resumed with its own classes and images.

    Args:
        checkpoint: the checkpoint of the run.
        data: data of the resumed run.
        allow_changed_data: True = changed images only cause a warning.

    Raises:
        UsageError: classes have changed, or images have and `allow_changed_data` is False.
    """
    meta = checkpoint.meta or {}
    old_classes = meta.get("classes")
    classes = data.named_classes()
    if old_classes and classes:
        _check_classes(checkpoint.path, old_classes, classes)
    old_fingerprints = meta.get("run", {}).get("images")
    fingerprints = data.fingerprints()
    if not old_fingerprints:
        return
    changed_splits = []
    for split in dict.fromkeys([*old_fingerprints, *fingerprints]):
        if old_fingerprints.get(split) != fingerprints.get(split):
            changed_splits.append(split)
    if not changed_splits:
        return
    message = (
        f"data: the images of {', '.join(changed_splits)} are not those "
        f"that {checkpoint.path} was trained with"
    )
    if not allow_changed_data:
        raise UsageError(
            f"{message}; set allow_changed_data=true to resume with them, "
            "or use ckpt=PATH in another run_dir to start a new run"
        )
    if is_first():
        log.warning("resume: %s (allow_changed_data=true)", message)


def _check_classes(path: Path, old_classes: Sequence[str], classes: Sequence[str]) -> None:
    for class_id, (old_name, name) in enumerate(zip_longest(old_classes, classes)):
        if old_name != name:
            raise UsageError(
                f"data: class {class_id} is {name!r}; must be {old_name!r}, as in {path}; "
                "use ckpt=PATH in another run_dir to start a new run"
            )


def check_teacher(checkpoint: Checkpoint, digest: str | None) -> None:
    """Check that the weights of a resumed run's teacher are unchanged; their file may have moved.

    Args:
        checkpoint: the checkpoint of the run.
        digest: digest of the teacher's weights; None = no teacher, and no check.

    Raises:
        UsageError: the teacher has other weights.
    """
    old_digest = (checkpoint.meta or {}).get("run", {}).get("teacher")
    if old_digest and digest and old_digest != digest:
        raise UsageError(
            f"resume: {checkpoint.path} was trained with another teacher "
            "(its weights come from teacher.*, else from the initial weights); "
            "use ckpt=PATH in another run_dir to start a new run"
        )


def check_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer of a resumed run has the parameter groups of its checkpoint.

    Otherwise torch would fail later, or mix the states of two optimizers.

    Raises:
        UsageError: the parameter groups differ.
    """
    old_groups = checkpoint.training.get("groups")
    groups = []
    for group in optimizer.state_dict()["param_groups"]:
        groups.append((_option_names(set(group) - {"params"}), len(group["params"])))
    if old_groups is not None:
        old_groups = [(_option_names(set(keys)), count) for keys, count in old_groups]
    if old_groups != groups:
        raise UsageError(
            f"resume: {checkpoint.path} has another optimizer or other parameter groups; "
            "use ckpt=PATH to start from it"
        )


def _option_names(keys: set[str]) -> list[str]:
    """Sorted names of a parameter group's options, with `initial_lr`, which a schedule adds."""
    return sorted(keys | {"initial_lr"})


def outputs_to_replace(cfg: DictConfig) -> list[Path]:
    """Files that a new run in a used directory replaces.

    Delete them only after all checks have passed and the file of `ckpt`, which may be one of them,
    has been read.

    Raises:
        UsedError: the directory contains files of another run, which must not be overwritten.
    """
    run_dir = Path(cfg.run_dir)
    used_files = outputs.used_files(run_dir)
    checkpoints = [path.name for path in outputs.checkpoints(run_dir)]
    # A run that was killed before its first `last.ckpt` cannot be resumed, so it may be replaced.
    has_only_best = all(name.startswith("best") for name in checkpoints)
    is_unsaved = has_only_best and not outputs.is_finished(run_dir)
    may_replace = cfg.overwrite or (cfg.resume == "auto" and is_unsaved)
    if used_files and not may_replace:
        hint = f"; resume=true resumes from {FILE_NAME}" if FILE_NAME in checkpoints else ""
        raise UsedError(
            f"run_dir={str(run_dir)!r} contains {used_files[0].name} already; "
            f"choose another run_dir or set overwrite=true{hint}"
        )
    return outputs.training_files(run_dir)
