"""`ptq.py`: quantize a trained model without training.

A float model is calibrated; a quantized model keeps its quantizers (`ptq=keep`). Then `ptq.method`
may fit weights, and `search` may improve scales. The model is evaluated and, except in a dry run,
written to `quantized.ckpt`.
"""

from __future__ import annotations

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
from qat.launch.run_dir import RESULTS
from qat.launch.slurm import write_owner
from qat.lit.accuracy import evaluate
from qat.lit.loggers import end_wandb_runs
from qat.model.convert import convert
from qat.model.cost import cost
from qat.model.metadata import classes_of
from qat.model.storage import save
from qat.ptq import calibrate, in_float
from qat.ptq.compensate import compensate
from qat.ptq.reconstruct import ReconstructSettings, reconstruct, split_batches
from qat.ptq.scale_vectors import scale_vectors
from qat.ptq.search import SearchSettings, logits_of, search
from qat.spec import recipe as preset
from qat.tasks import build, fit, summary
from qat.tasks.evaluate import measure
from qat.tasks.ptq_start import (
    KEEP,
    QUANTIZED_FILE,
    STATE_FILES,
    TABLES,
    build_ptq_recipe,
    build_reconstruct,
    build_search,
    calibration_batches,
    check_run_dir,
    check_start,
    target_net,
)
from qat.tasks.report import report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.tasks.resume import comparable_settings
from qat.tasks.set_up import set_up
from qat.tasks.subject import EvaluatedNet, build_evaluated_net, origin
from qat.utils.probing import copy_net
from qat.utils.validate import check_int

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def ptq(cfg: DictConfig) -> float:
    """Quantize a model, or search over the scales of a model that is already quantized.

    Args:
        cfg: config composed from `conf/ptq.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Top-1 of the quantized model in percent.

    Raises:
        UsageError: a setting, path or file cannot be used.
    """
    start_time = time.monotonic()
    set_up(cfg)
    check_int("ptq.batch", cfg.ptq.batch, 1)
    recipe = build_ptq_recipe(cfg)
    search_settings = build_search(cfg)
    method = KEEP if recipe is None else recipe.method
    reconstruct_settings = build_reconstruct(cfg, method)
    changes_weights = method in {"compensate", "reconstruct"}
    check_run_dir(cfg)
    build.import_modules(cfg.model.imports)

    subject = build_evaluated_net(cfg, tests_only=False)
    check_start(cfg, subject, has_search=search_settings is not None)
    teacher = target_net(cfg.teacher.ckpt, subject, sets_mean=cfg.data.get("mean") is not None)
    batches = calibration_batches(subject.data, cfg.ptq.batch)
    if reconstruct_settings is not None:
        # Fail early if there are too few images.
        split_batches(torch.cat(batches), reconstruct_settings.batch)
    trainer = fit.build_trainer(cfg, [], fit.build_loggers(cfg))
    if trainer.world_size > 1 and (changes_weights or search_settings):
        raise UsageError(
            f"trainer.devices={trainer.world_size}: must be 1 with a search or "
            "ptq.method=compensate or reconstruct"
        )
    if trainer.precision not in PRECISIONS:
        raise UsageError(
            f"trainer.precision={trainer.precision!r}: would round the float weights, which are "
            f"kept; must be one of {', '.join(PRECISIONS)}"
        )
    quantized = subject
    if recipe is not None:
        net = convert(copy_net(subject.net), recipe, input_size=subject.data.input_size)
        quantized = dataclasses.replace(subject, net=net, recipe=recipe)
    if search_settings is not None:
        # Fail early if no scale matches `search.targets`.
        scale_vectors(quantized.net, search_settings.targets)

    connect(trainer)
    if is_first():
        _begin_run_dir(cfg)
        _announce(cfg, quantized, batches, trainer)
    with end_wandb_runs(trainer.loggers):
        facts = _measure_float(trainer, subject, teacher)
        facts["calibration"] = None
        if recipe is None:
            facts["top1_start"] = _measure(trainer, subject, "unchanged quantized")["top1"]
        else:
            facts["calibration"] = _calibrate(quantized, batches, trainer)
            if changes_weights or search_settings:
                facts["top1_calibrated"] = _measure(trainer, quantized, "calibrated")["top1"]
        fit_start_time = time.monotonic()
        target_model = teacher
        if changes_weights:
            # The fit changes the weights of the quantized model, so the unquantized model provides
            # the targets of the fit and of a search.
            target_model = subject.net.to(trainer.strategy.root_device).eval()
            facts |= _fit_weights(
                cfg, quantized.net, target_model, batches, reconstruct_settings, trainer
            )
        if search_settings is not None:
            facts["search"] = _search(
                cfg, search_settings, quantized, batches, trainer, target_model
            )
        start_time -= _seconds_before_resume(facts, fit_start_time)
        if not cfg.trainer.fast_dev_run and is_first():
            _save(cfg, quantized, subject)
        results = _measure(trainer, quantized, "quantized")

    facts |= {"weights": origin(cfg), "wall_seconds": round(time.monotonic() - start_time, 1)}
    write_results(cfg, model=subject.name, **recipe_fields(quantized.recipe), **results, **facts)
    log.info(
        "%s top-1: float %.2f %%, quantized %.2f %%; outputs in %s",
        results["split"],
        facts["top1_fp"],
        results["top1"],
        cfg.run_dir,
    )
    report_run(cfg, quantized.net, subject.data.input_size)
    return float(results["top1"])


def _begin_run_dir(cfg: DictConfig) -> None:
    run_dir = Path(cfg.run_dir)
    if not cfg.resume and not cfg.trainer.fast_dev_run:
        for name in (*STATE_FILES, *TABLES, QUANTIZED_FILE, RESULTS):
            (run_dir / name).unlink(missing_ok=True)
    write_owner(run_dir)
    record_run(cfg)


def _save(cfg: DictConfig, quantized: EvaluatedNet, subject: EvaluatedNet) -> None:
    save(
        quantized.net,
        Path(cfg.run_dir) / QUANTIZED_FILE,
        model=subject.name,
        data=build.to_plain(cfg.data),
        classes=classes_of(quantized.net) or subject.data.named_classes(),
    )


def _announce(
    cfg: DictConfig, quantized: EvaluatedNet, batches: list[Tensor], trainer: Trainer
) -> None:
    """Log the model and its recipe, and write `conversion.txt`."""
    data = quantized.data
    images = f"{len(batches)} x {cfg.ptq.batch} training images, seed {data.settings.seed}"
    entries = {
        "data": summary.describe_data(data),
        "images": summary.describe_images(data.settings, quantized.assumed),
        "calibration": images,
        "weights": origin(cfg),
        "device": summary.describe_device(trainer),
        "outputs": str(cfg.run_dir),
    }
    summary.announce(
        "post-training quantization",
        quantized.net,
        quantized.name,
        quantized.recipe,
        data.input_size,
        **entries,
    )
    log.info(summary.write_conversion(quantized.net, Path(cfg.run_dir)))


def _measure(trainer: Trainer, subject: EvaluatedNet, description: str) -> dict[str, Any]:
    """Evaluate a model and move it to the trainer's device; return entries of `results.json`."""
    log.info("evaluating the %s model", description)
    results = measure(subject, trainer, cost(subject.net, subject.data.input_size))
    # Lightning moves the model to the CPU at the end of a test.
    subject.net.to(trainer.strategy.root_device)
    return results


def _measure_float(
    trainer: Trainer, subject: EvaluatedNet, teacher: nn.Module | None
) -> dict[str, Any]:
    """Scores of the teacher, or else of the model in float, as entries of `results.json`."""
    target = subject
    if teacher is not None:
        target = dataclasses.replace(subject, net=teacher, recipe=preset("fp"))
    with in_float(target.net):
        results = _measure(trainer, target, "float")
    return {f"{key}_fp": results.get(key) for key in ("top1", "top5", "loss")}


def _calibrate(quantized: EvaluatedNet, batches: list[Tensor], trainer: Trainer) -> dict[str, Any]:
    """Set the scales by calibration; return facts about the calibration for `results.json`."""
    calibration_start_time = time.monotonic()
    report = calibrate(quantized.net.to(trainer.strategy.root_device), batches)
    seconds = round(time.monotonic() - calibration_start_time, 2)
    log.info("calibrated %d scales on %d images in %.1f s", report.scales, report.images, seconds)
    return dataclasses.asdict(report) | {
        "seconds": seconds,
        "seed": quantized.data.settings.seed,
    }


def _fit_weights(
    cfg: DictConfig,
    net: nn.Module,
    float_net: nn.Module,
    batches: list[Tensor],
    settings: ReconstructSettings | None,
    trainer: Trainer,
) -> dict[str, Any]:
    """Compensate weights, and with `settings` reconstruct them; return facts for `results.json`."""
    fit_start_time = time.monotonic()
    layers = compensate(net, float_net, batches)
    if settings is None:
        return {
            "compensation": {
                "layers": layers,
                "seconds": round(time.monotonic() - fit_start_time, 1),
            }
        }
    facts = reconstruct(
        net,
        float_net,
        torch.cat(batches),
        settings,
        context=trainer.precision_plugin.forward_context,
        run_dir=None if cfg.trainer.fast_dev_run else cfg.run_dir,
        resume=bool(cfg.resume),
        run=comparable_settings(cfg),
    )
    return {"reconstruction": facts}


def _search(
    cfg: DictConfig,
    settings: SearchSettings,
    quantized: EvaluatedNet,
    batches: list[Tensor],
    trainer: Trainer,
    target_model: nn.Module | None,
) -> dict[str, Any]:
    """Search over the scales in place; return facts about the search for `results.json`.

    The targets are the logits of `target_model`; None = the quantized model, run in float.
    """
    net = quantized.net.eval()
    data = quantized.data
    device = trainer.strategy.root_device
    model = net if target_model is None else target_model.to(device).eval()
    with in_float(model):
        float_logits = [logits_of(model, batch, settings.micro_batch) for batch in batches]

    def accuracy() -> float:
        return evaluate(net, data.val_dataloader(), data.settings.num_classes, device)["top1"]

    result = search(
        net,
        batches,
        float_logits,
        settings,
        run_dir=None if cfg.trainer.fast_dev_run else cfg.run_dir,
        resume=bool(cfg.resume),
        run=comparable_settings(cfg),
        validate=accuracy,
    )
    log.info(
        "search: fitness %.6g to %.6g in %.1f s",
        result.fitness_before,
        result.fitness,
        result.seconds,
    )
    return dataclasses.asdict(result)


def _seconds_before_resume(facts: dict[str, Any], fit_start_time: float) -> float:
    """Seconds of reconstruction and search before the run was resumed."""
    seconds = 0.0
    for key in ("reconstruction", "search"):
        if key in facts:
            seconds += facts[key]["seconds"]
    return max(0.0, seconds - (time.monotonic() - fit_start_time))
