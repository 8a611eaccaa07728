"""`ptq.py`: quantize a net after its training: calibrate or keep what it has, fit, search, evaluate, write `quantized.ckpt`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn

from qat.errors import UsageError
from qat.launch.ranks import connect, is_first
from qat.lit.accuracy import evaluate
from qat.lit.loggers import closing
from qat.model.checkpoint import classes_of, save
from qat.model.convert import convert
from qat.model.cost import cost
from qat.ptq import calibrate, in_float
from qat.ptq.compensate import compensate
from qat.ptq.reconstruct import reconstruct, split_batches
from qat.ptq.search import SearchSettings, logits_of, search
from qat.ptq.vector import scale_vectors
from qat.spec import recipe as preset
from qat.tasks import build, fit, summary
from qat.tasks.checks import check_settings
from qat.tasks.evaluate import build_subject, measure, origin
from qat.tasks.predict import EvaluatedNet
from qat.tasks.ptq_start import (
    build_ptq_recipe,
    build_reconstruct,
    build_search,
    build_target_net,
    calibration_batches,
    check_run_dir,
    check_start,
)
from qat.tasks.report import report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.utils.validate import check_int

log = logging.getLogger(__name__)

FILE = "quantized.ckpt"


def ptq(cfg: DictConfig) -> float:
    """Quantize one net, or search over the scales of one that is quantized already.

    Args:
        cfg: composed from `conf/ptq.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Top-1 of the quantized net in percent.

    Raises:
        UsageError: a setting, path or file cannot work.
    """
    began = time.monotonic()
    check_settings(cfg)
    check_int("ptq.batch", cfg.ptq.batch, 1)
    recipe, fitting, searching = build_ptq_recipe(cfg), build_reconstruct(cfg), build_search(cfg)
    method = "keep" if recipe is None else recipe.method
    check_run_dir(cfg)
    build.import_modules(cfg)
    subject = build_subject(cfg)
    check_start(cfg, subject, searches=searching is not None)
    teacher = build_target_net(cfg, subject)
    batches = calibration_batches(cfg, subject.data)
    if method == "reconstruct":
        split_batches(torch.cat(batches), fitting.batch)
    trainer = fit.build_trainer(cfg, [], fit.build_loggers(cfg))
    if trainer.world_size > 1 and (method in {"compensate", "reconstruct"} or searching):
        raise UsageError(f"trainer.devices={trainer.world_size}: must be 1 with a search or ptq.method=compensate, reconstruct")
    quantized = subject
    if recipe is not None:
        net = convert(copy.deepcopy(subject.net), recipe, input_size=subject.data.input_size)
        quantized = dataclasses.replace(subject, net=net, recipe=recipe)
    if searching is not None:  # else a calibration would be for nothing
        scale_vectors(quantized.net, searching.targets)
    connect(trainer)
    if is_first():
        _remove_older(cfg)
        record_run(cfg)
        _announce(cfg, quantized, batches, trainer)
    with closing(trainer.loggers):
        figures = _measure_start(subject, teacher, trainer, keeps=recipe is None)
        quantized.net.to(trainer.strategy.root_device)
        if recipe is not None:
            figures["calibration"] = _calibrate(quantized, batches)
        if method in {"compensate", "reconstruct"} or (searching and recipe is not None):
            figures["top1_calibrated"] = _measure(trainer, quantized, "calibrated")["top1"]
        if method in {"compensate", "reconstruct"}:
            # What follows has to come close to the float net as it was: the weights of this one change.
            teacher = subject.net.to(trainer.strategy.root_device).eval()
            since = time.monotonic()
            layers = compensate(quantized.net, teacher, batches)
            if method == "compensate":
                figures["compensation"] = {"layers": layers, "seconds": round(time.monotonic() - since, 1)}
            else:
                place, context = {"run_dir": cfg.run_dir, "resume": bool(cfg.resume)}, trainer.precision_plugin.forward_context
                figures["reconstruction"] = reconstruct(quantized.net, teacher, torch.cat(batches), fitting, context=context, **place)
        if searching is not None:
            figures["search"] = _search(cfg, searching, quantized, batches, trainer, teacher)
        results = _conclude(cfg, quantized, trainer, figures, began)
    report_run(cfg, quantized.net, quantized.data.input_size, is_first=trainer.is_global_zero)
    return float(results["top1"])


def _remove_older(cfg: DictConfig) -> None:
    """Delete the net of a run that this one replaces, unless it is what this one starts from: then it is there until the new one is."""
    older = Path(cfg.run_dir) / FILE
    starts = [Path(path) for path in (cfg.ckpt, cfg.teacher.ckpt) if path]
    if not any(start.exists() and older.exists() and start.samefile(older) for start in starts):
        older.unlink(missing_ok=True)


def _announce(cfg: DictConfig, quantized: EvaluatedNet, batches: list[Tensor], trainer: Trainer) -> None:
    data = quantized.data
    entries = {
        "model": summary.describe_model(quantized.name, quantized.net, data.input_size),
        "recipe": summary.describe_recipe(quantized.recipe),
        "data": summary.describe_data(type(data).__name__.lower(), data),
        "calibration": f"{len(batches)} batches of {cfg.ptq.batch} training images, seed {data.settings.seed}",
        "weights": origin(cfg),
        "device": f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}",
        "outputs": str(cfg.run_dir),
    }
    log.info(summary.lines("qat: post-training quantization", entries))
    log.info(summary.conversion(quantized.net, Path(cfg.run_dir)))


def _measure(trainer: Trainer, subject: EvaluatedNet, what: str) -> dict[str, Any]:
    """Evaluate a net, which is on the trainer's device then: keys of `results.json`."""
    log.info("%s net", what)
    found = measure(subject, trainer, cost(subject.net, subject.data.input_size))
    subject.net.to(trainer.strategy.root_device)  # Lightning takes it to the CPU at the end of a test
    return found


def _measure_start(subject: EvaluatedNet, teacher: nn.Module | None, trainer: Trainer, *, keeps: bool) -> dict[str, Any]:
    """Top-1 in percent of the net that gives the targets, and of one that is quantized already as it came."""
    followed = subject if teacher is None else dataclasses.replace(subject, net=teacher, recipe=preset("fp"))
    with in_float(followed.net):
        figures: dict[str, Any] = {"top1_fp": float(_measure(trainer, followed, "float")["top1"]), "calibration": None}
    if keeps:
        figures["top1_start"] = _measure(trainer, subject, "quantized, as it came,")["top1"]
    return figures


def _calibrate(quantized: EvaluatedNet, batches: list[Tensor]) -> dict[str, Any]:
    """Fill the scales; gives what `results.json` says of it."""
    began = time.monotonic()
    done = calibrate(quantized.net, batches)
    seconds = round(time.monotonic() - began, 2)
    log.info("%d scales from %d images in %.1f s", done.scales, done.images, seconds)
    return dataclasses.asdict(done) | {"seconds": seconds, "seed": quantized.data.settings.seed}


def _search(
    cfg: DictConfig,
    settings: SearchSettings,
    quantized: EvaluatedNet,
    batches: list[Tensor],
    trainer: Trainer,
    teacher: nn.Module | None,
) -> dict[str, Any]:
    """Search over the scales, in place; targets are the logits of `teacher`, else of the net itself in float."""
    net, data, device = quantized.net.eval(), quantized.data, trainer.strategy.root_device
    followed = net if teacher is None else teacher.to(device).eval()
    with in_float(followed):
        targets = [logits_of(followed, batch, settings.micro_batch) for batch in batches]

    def accuracy() -> float:
        return evaluate(net, data.val_dataloader(), data.settings.num_classes, device)["top1"]

    found = search(net, batches, targets, settings, run_dir=cfg.run_dir, resume=bool(cfg.resume), validate=accuracy)
    log.info("search: fitness %.6g to %.6g in %.1f s", found.fitness_before, found.fitness, found.seconds)
    return dataclasses.asdict(found)


def _conclude(cfg: DictConfig, quantized: EvaluatedNet, trainer: Trainer, figures: dict[str, Any], began: float) -> dict[str, Any]:
    """Write and evaluate what came of it; gives the results."""
    net, data = quantized.net, quantized.data
    if not cfg.trainer.fast_dev_run and trainer.is_global_zero:
        classes = classes_of(net) or data.named_classes()
        save(net, Path(cfg.run_dir) / FILE, model=quantized.name, data=build.plain(cfg.data), classes=classes)
    found = _measure(trainer, quantized, "quantized")
    outcome = {"weights": origin(cfg), "wall_seconds": round(time.monotonic() - began, 1)}
    results = write_results(cfg, model=quantized.name, **recipe_fields(quantized.recipe), **found, **figures, **outcome)
    accuracies = (found["split"], figures["top1_fp"], found["top1"], cfg.run_dir)
    log.info("%s top-1 %.2f %% in float, %.2f %% quantized; outputs in %s", *accuracies)
    return results
