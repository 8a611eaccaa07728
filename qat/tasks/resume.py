"""Going on with a run that was stopped: what is compared with its checkpoint, and what a new run in a used directory replaces.

Two comparisons stand where their parts are known: averaged weights (`lit/module.py`) and batches of all processes (`data/sampler.py`).
Lightning restores weights, optimizer, schedule, loops and callbacks; `metrics.csv` loses the rows that come again (`lit/loggers.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qat.callbacks.last import NAME
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.ranks import is_first
from qat.launch.run_dir import UsedError
from qat.lit.strategies import PREVIOUS
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.spec import QuantRecipe

log = logging.getLogger(__name__)

# Where things are, how they are shown and how images come to the run: nothing of it changes a result. All other settings are compared.
NOT_COMPARED = {
    *(
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
    ),
    *("checkpoint.every_n_steps", "trainer.log_every_n_steps", "trainer.profiler"),
    *(f"data.{name}" for name in ("root", "num_workers", "memory_mb")),
    *(
        f"callbacks.{name}"
        for name in (
            "last",
            "progress",
            "epoch_log",
            "throughput",
            "learning_rate",
            "preemption",
            "finite",
        )
    ),
}
# A difference in these is refused; the net's own are compared with the net in the checkpoint.
_FIXED, _OF_THE_NET = ("optimizer.", "scheduler."), ("model.args", "model.name", "quant.")
# What changes the number of steps; the schedule was laid out for those that the run began with.
_STEPS = (
    *(
        "trainer.max_epochs",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.accumulate_grad_batches",
        "trainer.limit_train_batches",
    ),
    "data.batch_size",
)
_UNSET = "not set"


def find_resume(
    cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]
) -> Checkpoint | None:
    """What `resume` asks for: None to start, else the checkpoint to go on from.

    A `last.ckpt` that is gone or cannot be read gives way to the one before it, with a warning.

    Raises:
        UsageError: there is nothing to go on from under `true`, or the run had another model, recipe, optimizer or schedule.
    """
    folder = Path(cfg.run_dir) / "checkpoints"
    found = [path for name in (NAME, PREVIOUS[NAME]) if (path := folder / name).is_file()]
    if cfg.resume is False or (cfg.resume == "auto" and not found):
        return None
    if not found:
        raise UsageError(
            f"resume=true: run_dir={str(cfg.run_dir)!r} has no checkpoints/last.ckpt; use resume=auto to start a new run in that case"
        )
    if cfg.trainer.fast_dev_run:
        raise UsageError(
            f"trainer.fast_dev_run: resume={cfg.resume!r} would change {found[0]}; a dry run must have resume=false"
        )
    checkpoint = _read_first(found)
    if not checkpoint.training:
        raise UsageError(f"resume: {checkpoint.path} is not a training checkpoint")
    _check_net(checkpoint, cfg, recipe, model_args)
    done = checkpoint.training["epochs"]
    if done > cfg.trainer.max_epochs:
        raise UsageError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: {checkpoint.path} has {done} epochs; must be an integer of at least {done}"
        )
    kept = "a resumed run keeps its optimizer and schedule; use ckpt=PATH in another run_dir to start a new run"
    compare_settings((checkpoint.meta or {}).get("run", {}).get("settings"), cfg, _FIXED, kept)
    log.info("resumed at training step %d from %s", checkpoint.step or 0, checkpoint.path)
    return checkpoint


def _read_first(paths: list[Path]) -> Checkpoint:
    if paths[0].name != NAME:
        log.warning(
            "resume: %s is missing; resuming from %s", paths[0].with_name(NAME), paths[0].name
        )
    for path in paths[:-1]:
        try:
            return read_checkpoint(path, fmt="qat", setting="resume")
        except UsageError as error:
            log.warning("%s; resuming from %s", error, paths[-1].name)
    return read_checkpoint(paths[-1], fmt="qat", setting="resume")


def _check_net(
    checkpoint: Checkpoint, cfg: DictConfig, recipe: QuantRecipe, model_args: dict[str, Any]
) -> None:
    """A run goes on with the net it had; anything else is a new run that starts from weights."""
    meta, instead = checkpoint.meta or {}, "use ckpt=PATH to start from it"
    model = meta.get("model", {})
    if (model.get("name"), model.get("kwargs")) != (cfg.model.name, model_args):
        raise UsageError(
            f"resume: {checkpoint.path} holds {model}, not model {cfg.model.name} with {model_args}; {instead}"
        )
    # A knob that is newer than the file had its default; what rules mean and how step sizes are learned stays as it was.
    newer = {**QuantRecipe().to_dict(), "rule_bits": recipe.rule_bits, "steps": recipe.steps}
    stored = {**newer, **meta["recipe"]} if meta.get("recipe") else {"name": "fp"}
    wanted = {"name": "fp"} if recipe.name == "fp" else recipe.to_dict()
    differ = sorted(
        key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key)
    )
    if differ:
        raise UsageError(
            f"resume: {checkpoint.path} has another recipe (quant: {', '.join(differ)}); {instead}"
        )


def compare_settings(
    had: dict[str, Any] | None, cfg: DictConfig, fixed: tuple[str, ...], kept: str
) -> None:
    """Refuse settings that a run cannot change any more, and name all others that differ: no curve would show it.

    Args:
        had: settings of the run so far, nested or by name; None = not known.
        cfg: those of the run that goes on.
        fixed: beginnings of the names of those that stay.
        kept: why, for the message.

    Raises:
        UsageError: one of those that stay differs.
    """
    if had is None:
        return
    old, new = dict(_flat(had)), compared(cfg)
    changed = [
        name
        for name in {**old, **new}
        if old.get(name, _UNSET) != new.get(name, _UNSET) and not name.startswith(_OF_THE_NET)
    ]
    if differ := [name for name in changed if name.startswith(fixed)]:
        shown = ", ".join(
            f"{name}={new.get(name, _UNSET)!r} (it had {old.get(name, _UNSET)!r})"
            for name in differ
        )
        raise UsageError(f"{shown}: {kept}")
    for name in changed if is_first() else ():
        note = "; the learning rate follows the original schedule" if name in _STEPS else ""
        log.warning(
            "resume: %s was %r, is %r%s", name, old.get(name, _UNSET), new.get(name, _UNSET), note
        )


def compared(cfg: DictConfig) -> dict[str, Any]:
    """The settings of a run that shape its result, by name, as plain data: what its checkpoints hold of them."""
    found = _flat(OmegaConf.to_container(cfg, resolve=True))
    return {
        name: value if value is None or type(value) in {bool, int, float, str, list} else str(value)
        for name, value in found
    }


def _flat(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by name, those that are compared; older versions have nested ones in their checkpoints."""
    if name in NOT_COMPARED:
        return
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def check_data(cfg: DictConfig, checkpoint: Checkpoint, data: ImageData) -> None:
    """Raise `UsageError` unless a run goes on with its own classes and images; `allow_changed_data=true` takes other images."""
    meta = checkpoint.meta or {}
    had, has = meta.get("classes"), data.named_classes()
    if had and has and list(had) != has:
        number, old, new = next(
            (n, a, b) for n, (a, b) in enumerate(zip_longest(had, has)) if a != b
        )
        raise UsageError(
            f"data: class {number} must be {old!r} as in {checkpoint.path}, is {new!r}; use ckpt=PATH in another run_dir to start a new run"
        )
    prints, now = meta.get("run", {}).get("images"), data.fingerprints()
    changed = (
        [split for split in dict.fromkeys([*prints, *now]) if prints.get(split) != now.get(split)]
        if prints
        else []
    )
    if not changed:
        return
    what = f"data: the images of {', '.join(changed)} are not those that {checkpoint.path} was trained with"
    if not cfg.allow_changed_data:
        raise UsageError(
            f"{what}; set allow_changed_data=true to resume with them, or use ckpt=PATH in another run_dir to start a new run"
        )
    if is_first():
        log.warning("resume: %s (allow_changed_data=true)", what)


def check_teacher(checkpoint: Checkpoint, digest: str | None) -> None:
    """Raise `UsageError` unless a run continues with the weights of the teacher that it had; its file may have another name now."""
    had = (checkpoint.meta or {}).get("run", {}).get("teacher")
    if had and digest and had != digest:
        raise UsageError(
            f"resume: {checkpoint.path} was trained with other weights of the teacher (teacher.*, or the start where that is the teacher); "
            "use ckpt=PATH in another run_dir to start a new run"
        )


def check_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Raise `UsageError` unless the optimizer of a run that goes on is the one that it had: torch fails on it later, or mixes the two."""
    had = checkpoint.training.get("groups")
    have = [
        (sorted({*group, "initial_lr"} - {"params"}), len(group["params"]))
        for group in optimizer.state_dict()["param_groups"]
    ]
    if had is None or [(sorted({*keys, "initial_lr"}), count) for keys, count in had] != have:
        raise UsageError(
            f"resume: {checkpoint.path} has another optimizer, or one of other parameters; use ckpt=PATH to start from it"
        )


def outputs_to_replace(cfg: DictConfig) -> list[Path]:
    """What a new run in a used directory replaces, once everything is checked and a `ckpt` from there is in memory.

    Raises:
        UsedError: there are files of another run, and they may not be overwritten.
    """
    run_dir = Path(cfg.run_dir)
    used = outputs.used_files(run_dir)
    checkpoints = [path.name for path in outputs.checkpoints(run_dir)]
    # A run that was killed before its first last.ckpt has nothing to go on from.
    unsaved = checkpoints == ["best.ckpt"] or not (checkpoints or outputs.is_finished(run_dir))
    if used and not (cfg.overwrite or (cfg.resume == "auto" and unsaved)):
        more = f"; resume=true resumes from {NAME}" if NAME in checkpoints else ""
        raise UsedError(
            f"run_dir={str(run_dir)!r} holds {used[0].name} already; choose another run_dir or set overwrite=true{more}"
        )
    return outputs.training_files(run_dir)
