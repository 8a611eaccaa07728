"""`train.py`: build, train, evaluate the best checkpoint, write `results.json`. A training, from top to bottom."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from omegaconf import DictConfig

from qat.callbacks import LastCheckpoint
from qat.data import ImageData
from qat.launch.ranks import connect, is_first, write_owner
from qat.lit import QATModule
from qat.lit.loggers import closing
from qat.lit.module import OptimizerFactory
from qat.model.checkpoint import Checkpoint, build_from, describe, read_checkpoint
from qat.model.cost import cost
from qat.model.start import Start
from qat.spec import QuantRecipe
from qat.tasks import build, fit, summary
from qat.tasks.checks import (
    check_classes,
    check_classifier,
    check_options,
    check_patches,
    check_settings,
)
from qat.tasks.report import report_run
from qat.tasks.results import measured, recipe_fields, record_run, write_results
from qat.tasks.resume import (
    check_data,
    check_optimizer,
    check_teacher,
    compared,
    find_resume,
    outputs_to_replace,
)
from qat.tasks.summary import announce_run, announce_teacher
from qat.tasks.teacher import build_teacher, warn_of_normalization
from qat.utils.files import digest_of

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float:
    """Train one net.

    Settings come first, then what costs time: a mistake in the last of them shows before the first image is read.

    Args:
        cfg: composed from `conf/train.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Best validation top-1 in percent (of the final weights under `fast_dev_run`).

    Raises:
        UsageError: a setting, path or file cannot work; raised before the first step.
    """
    began = time.monotonic()
    check_settings(cfg)
    build.import_modules(cfg)
    recipe, loss, args = build.build_recipe(cfg), build.build_loss(cfg), build.model_args(cfg)
    check_options(cfg, recipe, loss)
    resume = find_resume(cfg, recipe, args)
    replaced = [] if resume else outputs_to_replace(cfg)
    trainer = fit.build_trainer(
        cfg,
        fit.build_callbacks(cfg),
        fit.build_loggers(cfg, resumed_at=(resume and resume.step) or 0),
    )
    optimizer, scheduler = (
        fit.build_optimizer_factory(cfg, trainer),
        fit.build_scheduler_factory(cfg),
    )

    data = build.build_data(cfg)
    data.batch_mixup()  # refuses what cannot be mixed before an image is read
    start = _start(cfg, resume, recipe, data, trainer, optimizer)
    fit.use_less_memory(cfg, start.net)
    teacher = build_teacher(cfg, loss, data)
    taught_by = None if teacher is None else digest_of(teacher.net.state_dict().values())
    if resume:
        check_teacher(resume, taught_by)
    # What checkpoints of the run hold beside weights: how to build the net, and what resuming compares.
    description = describe(
        start.net,
        model=cfg.model.name,
        model_kwargs=args,
        data=build.plain(cfg.data),
        classes=data.named_classes(),
    )
    module = QATModule(
        start.net,
        loss,
        num_classes=data.settings.num_classes,
        optimizer=optimizer,
        scheduler=scheduler,
        teacher=teacher,
        lsq_grad_batch=cfg.lsq_grad_batch,
        describe=description
        | {"run": {"settings": compared(cfg), "images": data.fingerprints(), "teacher": taught_by}},
    )

    connect(trainer)
    data.trainer = trainer  # from here on each process has its own share of the images
    if is_first():
        for path in replaced:
            path.unlink(missing_ok=True)
        write_owner(Path(cfg.run_dir))
        record_run(cfg)
        announce_run(cfg, recipe, data, start, module, trainer, optimizer.keywords["lr"])
    top1_fp = announce_teacher(teacher, data, trainer)
    fit.compile_nets(cfg, module.net, teacher)
    with closing(trainer.loggers):
        trainer.fit(module, datamodule=data, ckpt_path=str(resume.path) if resume else None)
        module.make_whole()
        val_top1, weights = _take_best(module, data, trainer)
        (metrics,) = trainer.test(module, datamodule=data, verbose=False)

    earlier = next(
        (
            one.earlier_seconds
            for one in trainer.checkpoint_callbacks
            if isinstance(one, LastCheckpoint)
        ),
        0.0,
    )
    with torch.compiler.set_stance("force_eager"):  # its hooks belong to no compiled graph
        costs = cost(module.net, data.input_size)
    found = measured(metrics, costs, data.settings.num_classes) | data.evaluation_facts(
        module.confusion
    )
    seconds = round(time.monotonic() - began + earlier, 1)
    outcome = {
        "weights": weights,
        "val_top1": val_top1,
        "top1_fp": top1_fp,
        "wall_seconds": seconds,
    }
    results = write_results(cfg, **recipe_fields(recipe), **found, **outcome)
    scores = ", ".join(
        f"{key} {text}".removeprefix("note ") for key, text in summary.scores(results).items()
    )
    size = summary.describe_size(module.net, costs.size_bytes)
    log.info("%s %s (%s); %s; outputs in %s", results["split"], scores, weights, size, cfg.run_dir)
    report_run(cfg, module.net, data.input_size)
    return val_top1


def _start(
    cfg: DictConfig,
    resume: Checkpoint | None,
    recipe: QuantRecipe,
    data: ImageData,
    trainer: Trainer,
    optimizer: OptimizerFactory,
) -> Start:
    """The net, quantized, on its device, as the run begins or is resumed."""
    if resume:
        check_data(cfg, resume, data)
        start = Start(
            build_from(resume).train(), [f"step {resume.step} of this run ({resume.path.name})"]
        )
    else:
        start = build.build_start(cfg)
        if start.source is not None:
            check_classes(start.source, data, f"ckpt={str(cfg.ckpt)!r}")
        warn_of_normalization(start, cfg, data)
    check_patches(start.net, data)
    check_classifier(start.net, data)
    start.net.to(trainer.strategy.root_device)
    if resume:
        check_optimizer(resume, optimizer(start.net))
    else:
        start.notes += build.quantize(
            start, recipe, data, init=cfg.model.init, processes=trainer.world_size
        )
    return start


def _take_best(module: QATModule, data: ImageData, trainer: Trainer) -> tuple[float, str]:
    """Put the weights of `best.ckpt` into the module; the final ones stay where no checkpoint was written.

    Returns:
        Validation top-1 of these weights in percent, and what they are called.
    """
    saved: Any = trainer.checkpoint_callbacks
    best: Any = next(
        (
            one
            for one in saved
            if isinstance(one, ModelCheckpoint) and one.monitor and one.best_model_score is not None
        ),
        None,
    )
    name = "final"
    if best is not None:
        module.net.load_state_dict(build_from(read_checkpoint(best.best_model_path)).state_dict())
        name = Path(best.best_model_path).name
        if best.monitor == "val/top1":
            return float(best.best_model_score), name
    loggers, trainer.loggers = trainer.loggers, []  # the rows of metrics are there already
    # An average would take the place of these weights.
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, WeightAveraging)]  # type: ignore[attr-defined]
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.loggers = loggers
    return float(trainer.callback_metrics.get("val/top1", torch.nan)), name
