"""What is no mistake: mutations after which a command may go on to its first step. Each was looked at; everything else is to be refused.

A setting may stand for several (`*`). Its kinds are those of `mutations.KINDS`; `removed` leaves a default in force.
"""

import dataclasses
import fnmatch
import typing

from qat.cli.schemas import Settings


def flags(kind=Settings, below=""):
    """Names of the settings that are true or false: a number is one of them, too."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from flags(hint, f"{below}{name}.")
        elif hint is bool:
            yield f"{below}{name}"


FLAGS = set(flags())

# Off, or on: what the config says itself.
SWITCHES = {
    "callbacks": "null",
    "callbacks.*": "null",  # one callback left out; of its settings below
    "logger": "null",
    "logger.*": "null",
    "search": "null",
    "quant.offsets": "true",
    "ptq.act_signed": "true",
    "ptq.weight_signed": "true",
    "ptq.bias_correction": "true",
    "search.relative": "true",
    "search.reference_selection": "true",
    "callbacks.ema.use_buffers": "true",
    "callbacks.best.enable_version_counter": "true",
    "model.args.class_token": "null true",
    "trainer.fast_dev_run": "null true zero",
}

# Left to what stands behind it: timm's own value, the file's, or a rule that the config names.
DEFAULTS = {
    "model.args.depth": "null",
    "model.args.embed_dim": "null",
    "model.args.num_heads": "null",
    "model.args.in_chans": "null",  # that of the data
    "model.args.num_classes": "null",
    "data.patch_size": "null",
    "data.rand_augment": "null",
    "data.calibration_images": "null",
    "data.seed": "null",
    "data._target_": "null",  # the data of the checkpoint
    "quant.act_bits": "null",
    "ptq.act_bits": "null",
    "ptq.residual_observer": "null",
    "search.radius": "null",
    "images": "null",
    "trainer.limit_*_batches": "null huge",  # all that there are
    "callbacks.cga.epochs": "null",
    "callbacks.best.monitor": "null",  # the last one is kept then
    "callbacks.best.filename": "null text",
    "callbacks.oscillation.dirpath": "null text",
    "callbacks.learning_rate.logging_interval": "null",
}

# Numbers without an end, or whose end the mutation does not pass: a rate too high shows in the first loss that is not finite.
NUMBERS = {
    "optimizer.lr": "fraction huge",
    "optimizer.scale_lr_factor": "fraction huge",
    "optimizer.weight_decay": "zero fraction huge",
    "optimizer.momentum": "zero",
    "scheduler.min_lr": "zero fraction huge",
    "scheduler.warmup_lr": "zero fraction huge",
    "callbacks.cga.lr": "fraction huge",
    "callbacks.finite.max_scale_change": "fraction huge",
    "callbacks.cga.start_epoch": "zero",
    "callbacks.ema.decay": "zero",
    "callbacks.freeze.threshold": "fraction huge",
    "callbacks.freeze.final_threshold": "fraction huge",
    "callbacks.oscillation.threshold": "zero fraction huge",
    "callbacks.oscillation.probe_images": "zero",
    "callbacks.best.save_top_k": "negative zero",  # all, none
    "data.hflip": "zero",
    "data.shift": "zero",
    "data.color_jitter": "zero",
    "data.random_erasing": "zero",
    "data.mixup": "fraction huge",
    "data.cutmix": "fraction huge",
    "data.mixup_prob": "zero",
    "data.mixup_switch_prob": "zero",
    "data.num_workers": "zero",
    "data.memory_mb": "zero fraction huge",
    "latency": "zero",
    "model.args.drop_path_rate": "zero",
    "loss.kure": "zero fraction huge",
    "loss.grad_l1": "zero fraction huge",
    "loss.features": "zero fraction huge",
    "loss.kure_target": "fraction huge",
    "loss.regularizers.*.weight": "zero fraction huge",
    "loss.regularizers.*.target": "fraction huge",
    "loss.terms.dampening.weight": "zero fraction huge",
    "loss.label_smoothing": "zero",
    "loss.terms.*.label_smoothing": "zero",
    "loss.hard_weight": "zero fraction huge",
    "loss.terms.*.hard_weight": "zero fraction huge",
    "loss.temperature": "fraction huge",
    "loss.terms.*.temperature": "fraction huge",
    "ptq.reconstruct.lr": "zero fraction huge",
    "ptq.reconstruct.scale_lr": "zero fraction huge",
    "ptq.reconstruct.later": "zero fraction huge",
    "search.average_bits": "huge",  # a budget that never binds
    "search.cache_gib": "zero fraction huge",
    "search.front_points": "zero",
    "search.generations": "zero",
    "search.passes": "zero",
    "search.radius": "fraction huge",
    "search.temperature": "fraction huge",
    "analysis.budget_mb": "fraction huge list",
    "analysis.high": "fraction huge",
    "analysis.temperature": "fraction huge",
    "analysis.threshold": "zero",
    "trainer.gradient_clip_val": "zero fraction huge",
    "trainer.limit_val_batches": "zero",
    "trainer.log_every_n_steps": "zero",
    "trainer.num_sanity_val_steps": "negative",
}

# Words that nobody checks because nobody reads them here, or because any word will do.
WORDS = {
    "model.row": "empty null text true zero negative fraction huge nan inf",  # experiment=... looks it up, nothing else
    "quant.name": "text",
    "ptq.name": "text",
    "data.root": "text",  # digits read no files
    "data.image_column": "text",
    "data.label_column": "text",
    "data.model": "text",
    "loss.*_layers": "text",  # of a regularizer that is off
    "loss.regularizers.*.layers": "text",
    "teacher.ckpt": "text",  # a warning, as above
    "labels": "list",
    "ckpt": "list",
    "logger.csv.name": "null text",
    "logger.csv.save_dir": "text",
    "logger.csv.version": "null text zero negative",
    "logger.*.run_dir": "text",
    "logger.mlflow.store": "null text",
    "logger.wandb.project": "text",
}

# Settings whose absence leaves a default in force; the others are read from the config alone.
REMOVABLE = (
    "analysis.*",
    "callbacks*",
    "ckpt*",
    "data._target_",
    "data.*",
    "dynamic_batch",
    "logger*",
    "loss.*",
    "model",
    "model.*",
    "optimizer.*",
    "ptq.*",
    "quant.*",
    "report",
    "search*",
    "trainer.*",
)

# Refused in words of their own, which say it better than the setting's name.
SAID_OTHERWISE = {
    ("model.args.global_pool", "null"): "Token pooling needs the class token",
    ("model.args.global_pool", "removed"): "Token pooling needs the class token",
    ("model.name", "null"): "give model=...",
    ("model.name", "removed"): "give model=...",
    ("ptq.name", "text"): "ptq=keep search=evolution from one like this",
    ("ptq.name", "removed"): "ptq=keep search=evolution from one like this",
}


def is_allowed(mutation):
    """True if a command may go on to its first step."""
    if mutation.kind == "removed":
        return any(fnmatch.fnmatchcase(mutation.setting, pattern) for pattern in REMOVABLE)
    if mutation.setting in FLAGS and mutation.kind in {"true", "zero", "negative", "huge"}:
        return True
    found = [kinds for table in (SWITCHES, DEFAULTS, NUMBERS, WORDS) for kinds in _matching(table, mutation.setting)]
    return any(mutation.kind in kinds.split() for kinds in found)


def _matching(table, setting):
    parts = setting.count(".")
    return [kinds for pattern, kinds in table.items() if pattern.count(".") == parts and fnmatch.fnmatchcase(setting, pattern)]
