"""`eval.py`: measure the accuracy of a model, or predict classes with it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.ranks import connect, is_first
from qat.lit import QATModule
from qat.lit.loggers import end_wandb_runs
from qat.losses import CompositeLoss, CrossEntropy
from qat.model.cost import Cost, cost
from qat.tasks import build, fit, summary
from qat.tasks.predict import check_one_device, find_images, predict
from qat.tasks.report import report_run
from qat.tasks.results import (
    correct_field,
    recipe_fields,
    record_run,
    score_fields,
    size_fields,
    write_class_tables,
    write_results,
)
from qat.tasks.set_up import set_up
from qat.tasks.subject import EvaluatedNet, build_evaluated_net, origin
from qat.utils.text import format_count

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> float | None:
    """Evaluate one model on labelled images, or predict classes of unlabelled images.

    `split` chooses the images; null means test, or val if the data have no test split. `predict`
    names images without labels.

    Args:
        cfg: config composed from `conf/eval.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Top-1 in percent; None with `predict`.

    Raises:
        UsageError: a setting, path or file cannot be used.
    """
    start_time = time.monotonic()
    set_up(cfg)
    build.import_modules(cfg.model.imports)
    is_prediction = cfg.predict is not None
    paths = find_images(cfg.predict) if is_prediction else []
    if is_prediction and cfg.split is not None:
        raise UsageError(f"split={cfg.split!r}: must be null with predict")
    outputs.check_own(Path(cfg.run_dir), cfg.command, origin(cfg))

    subject = build_evaluated_net(cfg)
    subject.data.requested_split = cfg.split
    trainer = fit.build_trainer(cfg, [], fit.build_loggers(cfg))
    if is_prediction:
        check_one_device(cfg, trainer)
    else:
        connect(trainer)
    if is_first():
        record_run(cfg)
    _announce(cfg, subject, paths, trainer)
    costs = cost(subject.net, subject.data.input_size)
    with end_wandb_runs(trainer.loggers):
        if is_prediction:
            predict(cfg, subject, paths, trainer)
            results: dict[str, Any] = {"data": None, **size_fields(costs)}
        else:
            results = measure(subject, trainer, costs, Path(cfg.run_dir))

    write_results(
        cfg,
        model=subject.name,
        **recipe_fields(subject.recipe),
        weights=origin(cfg),
        **results,
        wall_seconds=round(time.monotonic() - start_time, 1),
    )
    if not is_prediction:
        report_run(cfg)
    return results.get("top1")


def _announce(cfg: DictConfig, subject: EvaluatedNet, paths: list[Path], trainer: Trainer) -> None:
    """Log the model and the images of an evaluation; `paths` are the images of a prediction."""
    data = subject.data
    if paths:
        title = "prediction"
        images = f"{format_count(len(paths), 'image')} of {cfg.predict}"
    else:
        title = "evaluation"
        images = summary.describe_data(data)
    entries = {
        "data": images,
        "images": summary.describe_images(data.settings, subject.assumed),
        "weights": origin(cfg),
        "device": summary.describe_device(trainer),
    }
    summary.announce(title, subject.net, subject.name, subject.recipe, data.input_size, **entries)


def measure(
    subject: EvaluatedNet, trainer: Trainer, costs: Cost, folder: Path | None = None
) -> dict[str, Any]:
    """Evaluate a model on `evaluation_split` of its data, and log its scores.

    Args:
        subject: model and data.
        trainer: Lightning's trainer.
        costs: costs of the model.
        folder: folder for tables of the classes; None = no tables, and no results by class.

    Returns:
        Entries of `results.json`: accuracies in percent, loss, sizes, which images are classified
        correctly, facts about the split, and with `folder` the results by class, unless there are
        too many classes.
    """
    data = subject.data
    num_classes = data.settings.num_classes
    loss = CompositeLoss({"ce": CrossEntropy()})
    module = QATModule(subject.net, loss, num_classes=num_classes)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    results = score_fields(metrics, costs, num_classes)
    results |= correct_field(module.correct)
    results |= data.evaluation_facts(module.confusion)
    entries = summary.score_texts(results)
    entries["loss"] = f"{results['loss']:.4f}"
    entries["size"] = summary.describe_size(subject.net, costs.size_bytes)
    log.info(summary.aligned_lines(f"{data.evaluation_split} split", entries))
    if module.confusion is not None and folder is not None:
        results |= write_class_tables(folder, module.confusion, subject.classes)
    return results
