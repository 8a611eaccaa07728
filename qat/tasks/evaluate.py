"""`eval.py`: accuracy of a checkpoint, rebuilt from the file alone, or of a timm model; or its predictions."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from qat import kernels
from qat.data import ImageData
from qat.data.settings import DataSettings
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.ranks import connect, is_first
from qat.lit import QATModule
from qat.lit.loggers import closing
from qat.lit.quiet import quiet_libraries
from qat.losses import CompositeLoss, CrossEntropy
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.convert import conversion_of
from qat.model.cost import Cost, cost
from qat.model.metadata import classes_of
from qat.model.scales import check_finite
from qat.model.storage import build_from
from qat.model.transform import data_config
from qat.spec import recipe
from qat.tasks import build, fit, summary
from qat.tasks.checks import DATASETS, check_classes, check_classifier, check_patches, check_trainer
from qat.tasks.hub import resolve_hub_model
from qat.tasks.predict import EvaluatedNet, class_names, find_images, predict
from qat.tasks.report import report_run
from qat.tasks.results import (
    class_results,
    measured,
    recipe_fields,
    record_run,
    sizes,
    write_class_tables,
    write_results,
)
from qat.tasks.settings import check as check_settings
from qat.utils.text import count

log = logging.getLogger(__name__)
# Readers of timm that fetch what they are named (`qat.data.Timm`).
DOWNLOADED = ("hfds/", "hfids/", "tfds/")


def evaluate(cfg: DictConfig) -> float | None:
    """Evaluate one net on `split` (null: test, val where there is none), or with `predict` on images without labels.

    Args:
        cfg: composed from `conf/eval.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Top-1 in percent; None with `predict`.

    Raises:
        UsageError: a setting, path or file cannot work.
    """
    began = time.monotonic()
    check_settings(cfg)
    quiet_libraries()
    resolve_hub_model(cfg)
    build.count_classes(cfg)
    kernels.use(cfg.kernels)
    check_trainer(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)
    build.import_modules(cfg)
    paths = None if cfg.predict is None else find_images(cfg.predict)
    if paths is not None and cfg.split is not None:
        raise UsageError(f"split={cfg.split!r}: must be null with predict")
    outputs.check_own(Path(cfg.run_dir), cfg.command, origin(cfg))
    subject = build_subject(cfg)
    subject.data.tested = cfg.split
    if is_first():
        record_run(cfg)
    trainer = fit.build_trainer(cfg, [], fit.build_loggers(cfg))
    if paths is None:  # predictions are made by one process, which `predict` says
        connect(trainer)
    data = subject.data
    shown = {
        "data": summary.describe_data(data)
        if paths is None
        else f"{count(len(paths), 'image')} of {cfg.predict}",
        "images": summary.describe_images(data.settings, subject.assumed),
        "weights": origin(cfg),
        "device": summary.describe_device(trainer),
    }
    title = "evaluation" if paths is None else "prediction"
    summary.announce(title, subject.net, subject.name, subject.recipe, data.input_size, **shown)
    costs = cost(subject.net, data.input_size)
    with closing(trainer.loggers):
        if paths is None:
            found = measure(subject, trainer, costs, Path(cfg.run_dir))
        else:
            predict(cfg, subject, paths, trainer)
            found = {"data": None, **sizes(costs)}
    write_results(
        cfg,
        model=subject.name,
        **recipe_fields(subject.recipe),
        weights=origin(cfg),
        **found,
        wall_seconds=round(time.monotonic() - began, 1),
    )
    if paths is None:
        report_run(cfg)
    return found.get("top1")


def build_subject(cfg: DictConfig) -> EvaluatedNet:
    """The net of `ckpt` or `model`, its data and their classes.

    Raises:
        UsageError: a setting or file cannot work, or they do not fit.
    """
    checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format) if cfg.ckpt else None
    data_as_given = build.plain(cfg.data)
    settle_data(cfg, checkpoint)
    data = build.build_data(cfg)
    data.evaluates_whole = cfg.get("split") is None and not _is_trained_on(checkpoint, data)
    net, name = _net(cfg, checkpoint, data)
    check_finite(net, f"ckpt={origin(cfg)!r}")
    done, settings = conversion_of(net), data.settings
    if (classes := getattr(net, "num_classes", settings.num_classes)) != settings.num_classes:
        raise UsageError(
            f"data.num_classes={settings.num_classes}: the model has {classes} classes"
        )
    if done is not None and done.input_size != data.input_size:
        raise UsageError(
            f"data.image_size={settings.image_size}: the model is quantized for images of {done.input_size}, got {data.input_size}"
        )
    check_patches(net, data)
    check_classifier(net, data)
    if cfg.get("predict") is None:
        check_classes(net, data, f"ckpt={origin(cfg)!r}")
    names = class_names(classes_of(net), data)
    assumed = summary.assumed_settings(cfg, data_as_given, net, data)
    net_recipe = recipe("fp") if done is None else done.recipe
    return EvaluatedNet(net, name, net_recipe, data, names, assumed)


def measure(
    subject: EvaluatedNet, trainer: Trainer, costs: Cost, folder: Path | None = None
) -> dict[str, Any]:
    """Accuracies in percent, loss, sizes: the keys of `results.json` that a test split gives.

    Args:
        subject: net and data.
        trainer: runs them.
        costs: of the net.
        folder: where tables of its classes are written, which are then among the keys as well.
    """
    data = subject.data
    module = QATModule(
        subject.net, CompositeLoss({"ce": CrossEntropy()}), num_classes=data.settings.num_classes
    )
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    found = measured(metrics, costs, data.settings.num_classes) | data.evaluation_facts(
        module.confusion
    )
    shown = summary.scores(found) | {
        "loss": f"{found['loss']:.4f}",
        "size": summary.describe_size(subject.net, costs.size_bytes),
    }
    log.info(summary.lines(f"{data.evaluation_split} split", shown))
    if module.confusion is not None and folder is not None:
        if is_first():
            write_class_tables(folder, module.confusion, subject.classes)
        found |= class_results(module.confusion, subject.classes)
    return found


def settle_data(cfg: DictConfig, checkpoint: Checkpoint | None) -> None:
    """Put the data config in force into `cfg.data`: the one asked for, else the checkpoint's, else digits.

    For predictions nothing but the treatment of an image is wanted: the checkpoint's data need not be there, and a net of unknown data
    gets its images as `qat.transform` has it, one of timm's as ImageNet.

    Raises:
        UsageError: the checkpoint names a dataset from outside this package.
    """
    wanted: dict[str, Any] = {k: v for k, v in build.plain(cfg.data).items() if v is not None}
    meta, predicts = (
        (checkpoint.meta or {}) if checkpoint is not None else {},
        cfg.get("predict") is not None,
    )
    if "_target_" in wanted:
        kind = DATASETS.get(wanted["_target_"], ImageData)
        reads_model = "model" in cfg.data and "model" not in kind.UNREAD
        if meta and reads_model and cfg.data.model is None:
            cfg.data.model = meta["model"][
                "name"
            ]  # photos are cropped and normalised as that model wants them
        return
    stored = _stored_data(meta, cfg)
    if "_target_" not in stored:
        stored = build.plain(cfg.default_photos if predicts else cfg.default_data)
        if predicts and checkpoint is not None and meta:
            stored |= {"_target_": "qat.data.ImageFolder", **data_config(build_from(checkpoint))}
    if predicts:
        stored |= {"root": None}
    elif stored.get("root") is not None and "root" not in wanted:
        _check_stored_root(cfg.ckpt, str(stored["root"]))
    with open_dict(cfg):
        # Of the machine that wrote the file, or of a stranger: how many workers is this machine's business.
        cfg.data = OmegaConf.create({**stored, "num_workers": None, **wanted})


def _stored_data(meta: Mapping[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """The data config of a checkpoint. A dataset that a file names could run code: only our own are built, from plain values.

    One that would be downloaded has to be asked for by an evaluation; predictions need none of its images.

    Raises:
        UsageError: it names anything else, or hides a name or an interpolation among the values.
    """
    stored = dict(meta.get("data") or {})
    target, values = (
        stored.get("_target_"),
        [value for key, value in stored.items() if key != "_target_"],
    )
    if ("_target_" in stored and target not in DATASETS) or any(
        mark in repr(values) for mark in ("_target_", "${")
    ):
        raise UsageError(
            f"ckpt={cfg.ckpt!r} was trained on {target!r}, which is not part of qat; choose it with data=..."
        )
    if target in DATASETS:  # older files may hold what their dataset ignored
        unread = DATASETS[target].UNREAD
        stored = {key: value for key, value in stored.items() if key not in unread}
    name = str(stored.get("name"))
    if target != "qat.data.Timm" or not (
        stored.get("download") or name.lower().startswith(DOWNLOADED)
    ):
        return stored
    if cfg.get("predict") is None:
        raise UsageError(
            f"ckpt={cfg.ckpt!r} was trained on {name!r}, which may be downloaded; choose it with data=timm data.name={name}"
        )
    shared = {field.name for field in dataclasses.fields(DataSettings)}
    return {
        "_target_": "qat.data.ImageFolder",
        **{key: value for key, value in stored.items() if key in shared},
    }


def _check_stored_root(ckpt: str, root: str) -> None:
    """Raise `UsageError` if a file names a folder that holds everything of a user or a machine: to read it would take hours."""
    home = Path(os.path.expanduser("~")).resolve()
    folder = Path(root).resolve()
    if folder in {Path(folder.anchor), *home.parents}:
        raise UsageError(
            f"ckpt={ckpt!r}: names data.root={root!r}; must be the folder of a dataset; set data.root=FOLDER"
        )


def _is_trained_on(checkpoint: Checkpoint | None, data: ImageData) -> bool:
    """True if a checkpoint names the folder of the data as its own: some of its images are then in the training."""
    meta = checkpoint.meta if checkpoint is not None else None
    stored = ((meta or {}).get("data") or {}).get("root")
    return bool(stored and data.settings.root) and os.path.realpath(
        str(stored)
    ) == os.path.realpath(str(data.settings.root))


def origin(cfg: DictConfig) -> str:
    """Where the weights come from, in a word or as a path."""
    pretrained = "timm's pretrained" if cfg.model.pretrained else "random"
    return str(cfg.ckpt or cfg.model.weights or pretrained)


def _net(cfg: DictConfig, checkpoint: Checkpoint | None, data: ImageData) -> tuple[nn.Module, str]:
    if checkpoint is not None and checkpoint.meta is not None:
        held, wanted = checkpoint.meta["model"]["name"], cfg.model.name
        if wanted not in {None, held}:
            raise UsageError(
                f"model.name={wanted!r}: ckpt={cfg.ckpt!r} holds {held}; leave model out"
            )
        return build_from(checkpoint, data.input_size[1:]), held
    theirs = None if checkpoint is None else build.authors_net(cfg, checkpoint)
    if theirs is not None:
        log.info("%s", theirs.note)
        return theirs.net, theirs.model
    if cfg.model.name is None:
        if checkpoint is None:
            raise UsageError(
                "ckpt is not set: must be a checkpoint; or set model=NAME with model.pretrained=true or model.weights=FILE"
            )
        raise UsageError(f"ckpt={cfg.ckpt!r} does not say which model it holds; set model=NAME")
    return build.build_start(cfg, keep_head=True).net.eval(), cfg.model.name
