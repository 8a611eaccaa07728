"""`eval.py`: accuracy of a checkpoint, rebuilt from the file alone, or of a timm model."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

import qat.data
from qat.checkpoint import Checkpoint, build_from, read_checkpoint
from qat.conversion import check_input, conversion_of
from qat.cost import cost
from qat.data import ImageData
from qat.errors import UsageError
from qat.lit import QATModule
from qat.lit.loggers import close
from qat.losses import CompositeLoss, CrossEntropy
from qat.spec import check_whole, recipe
from qat.tasks import build, summary
from qat.tasks.results import measured, recipe_fields, write_results

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> float:
    """Evaluate one net on the test split (val where there is none).

    Args:
        cfg: composed from `conf/eval.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Top-1 in percent.

    Raises:
        UsageError: a setting, path or file cannot work.
    """
    began = time.monotonic()
    check_whole("seed", cfg.seed, 0)
    seed_everything(cfg.seed, workers=True, verbose=False)
    build.import_modules(cfg)
    checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format) if cfg.get("ckpt") else None
    settle_data(cfg, checkpoint)
    data = build.build_data(cfg)
    net, name = _net(cfg, checkpoint)
    _check_fit(net, data)
    done = conversion_of(net)
    in_force = recipe("fp") if done is None else done.recipe
    module = QATModule(net, CompositeLoss({"ce": CrossEntropy()}), num_classes=data.settings.num_classes)
    trainer = build.build_trainer(cfg, [], build.build_loggers(cfg))
    entries = {
        "model": summary.describe_model(name, net, data),
        "recipe": summary.describe_recipe(in_force),
        "data": summary.describe_data(type(data).__name__.lower(), data),
        "weights": _origin(cfg),
        "device": f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}",
    }
    log.info(summary.lines("qat: evaluation", entries))
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    close(trainer.loggers)
    costs = cost(net, data.input_size)
    results = write_results(
        cfg,
        model=name,
        **recipe_fields(in_force),
        split=data.evaluation_split,
        weights=_origin(cfg),
        **measured(metrics, costs),
        wall_seconds=round(time.monotonic() - began, 1),
    )
    shown = {"top-1": f"{results['top1']:.2f} %", "top-5": f"{results['top5']:.2f} %", "loss": f"{results['loss']:.4f}"}
    log.info(summary.lines(f"{data.evaluation_split} split", shown | {"size": f"{costs.size_bytes} bytes as stored"}))
    return float(results["top1"])


def settle_data(cfg: DictConfig, checkpoint: Checkpoint | None) -> None:
    """Put the data config in force into `cfg.data`: the one asked for, else the checkpoint's, else digits.

    Raises:
        UsageError: the checkpoint names a dataset from outside this package.
    """
    wanted: dict[str, Any] = {k: v for k, v in build.plain(cfg.data).items() if v is not None}
    if "_target_" in wanted:
        if checkpoint is not None and checkpoint.meta is not None and "model" in cfg.data and cfg.data.model is None:
            cfg.data.model = checkpoint.meta["model"]["name"]  # photos are cropped and normalised as that model wants them
        return
    stored = (checkpoint.meta or {}).get("data") if checkpoint is not None else None
    if stored:
        _refuse_foreign(stored, cfg.ckpt)
    with open_dict(cfg):
        cfg.data = OmegaConf.create({**(stored or build.plain(cfg.default_data)), **wanted})


def _refuse_foreign(stored: dict[str, Any], path: str) -> None:
    """A dataset named in a file is an instruction to run code: only our own classes are built, from plain values.

    Raises:
        UsageError: it names anything else, or hides a name or an interpolation among the values.
    """
    ours = {f"qat.data.{name}" for name in qat.data.__all__}
    values = [value for key, value in stored.items() if key != "_target_"]
    if stored.get("_target_") not in ours or any(mark in repr(values) for mark in ("_target_", "${")):
        raise UsageError(f"ckpt={path!r} was trained on {stored.get('_target_')!r}, which is not part of qat; choose it with data=...")


def _origin(cfg: DictConfig) -> str:
    """Where the weights come from, in a word or as a path."""
    pretrained = "timm's pretrained" if OmegaConf.select(cfg, "model.pretrained") else "random"
    return str(cfg.get("ckpt") or OmegaConf.select(cfg, "model.weights") or pretrained)


def _net(cfg: DictConfig, checkpoint: Checkpoint | None) -> tuple[nn.Module, str]:
    if checkpoint is not None and checkpoint.meta is not None:
        return build_from(checkpoint), checkpoint.meta["model"]["name"]
    if OmegaConf.select(cfg, "model.name") is None:
        what = "ckpt is not set" if checkpoint is None else f"ckpt={cfg.ckpt!r} does not say what net it holds"
        raise UsageError(f"{what}; give model=... (with model.pretrained=true, model.weights=FILE or ckpt=FILE)")
    return build.build_start(cfg).net.eval(), cfg.model.name


def _check_fit(net: nn.Module, data: ImageData) -> None:
    classes = getattr(net, "num_classes", data.settings.num_classes)
    if classes != data.settings.num_classes:
        raise UsageError(f"data.num_classes={data.settings.num_classes}: the net has {classes} classes")
    done = conversion_of(net)
    if done is not None and done.input_size != data.input_size:
        raise UsageError(
            f"data.image_size={data.settings.image_size}: the net is quantized for images of {done.input_size}, got {data.input_size}"
        )
    check_input(net, data.input_size)
