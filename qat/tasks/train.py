"""`train.py`: build, train, evaluate the best checkpoint, write `results.json`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from qat.callbacks import LastCheckpoint
from qat.cli.results import measured, recipe_fields, write_results
from qat.data import ImageData
from qat.launch.group import connect
from qat.launch.ranks import is_first
from qat.launch.slurm import write_owner
from qat.lit import QATModule
from qat.lit.loggers import closing
from qat.lit.module import OptimizerFactory
from qat.model.checkpoint import Checkpoint, build_from, describe, read_checkpoint
from qat.model.cost import cost
from qat.model.start import Start
from qat.spec import QuantRecipe
from qat.tasks import build, fit, options
from qat.tasks.announce import announce_early_end, announce_run, announce_teacher
from qat.tasks.checks import check_batches, check_classes, check_classifier, check_patches, check_settings
from qat.tasks.compare import compared
from qat.tasks.report import record_run, report_run
from qat.tasks.resume import check_data, check_optimizer, find_resume, outputs_to_replace
from qat.tasks.teacher import build_teacher

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float:  # noqa: PLR0915  (a training, from top to bottom)
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
    recipe, loss = build.build_recipe(cfg), build.build_loss(cfg)
    resume = find_resume(cfg, recipe, build.model_args(cfg))
    replaced = [] if resume else outputs_to_replace(cfg)
    scheduler = fit.build_scheduler_factory(cfg)
    trainer = fit.build_trainer(cfg, fit.build_callbacks(cfg), fit.build_loggers(cfg, resumed_at=resume.step if resume else None))
    optimizer = fit.build_optimizer_factory(cfg, trainer)
    options.check_options(cfg, recipe, loss, trainer.strategy.root_device)

    data = build.build_data(cfg)
    data.batch_mixup()  # refuses what cannot be mixed before an image is read
    loss.class_weights = data.class_weights()
    start = _start(cfg, resume, recipe, data, trainer, optimizer)
    teacher = build_teacher(cfg, loss, data, start.net)
    check_batches(cfg.trainer, data, trainer.world_size)
    module = QATModule(
        start.net,
        loss,
        num_classes=data.settings.num_classes,
        optimizer=optimizer,
        scheduler=scheduler,
        teacher=teacher,
        lsq_grad_batch=cfg.lsq_grad_batch,
        describe=_describe(cfg, start, data),
    )

    connect(trainer, build.plain(cfg))
    data.trainer = trainer  # from here on each process has its own share of the images
    if is_first():
        _take_directory(cfg, replaced)
        announce_run(cfg, recipe, data, start, module, trainer)
    top1_fp = announce_teacher(teacher, data, trainer)
    options.compile_nets(cfg, module.net, teacher)
    with closing(trainer.loggers):
        trainer.fit(module, datamodule=data, ckpt_path=str(resume.path) if resume else None)
        module.make_whole()
        announce_early_end(trainer)
        val_top1, weights = _take_best(module, data, trainer)
        outcome = {"weights": weights, "val_top1": val_top1, "top1_fp": top1_fp, "wall_seconds": _seconds_since(began, trainer)}
        _test(cfg, recipe, data, module, trainer, outcome)
    report_run(cfg, module.net, data.input_size, is_first=trainer.is_global_zero)
    return val_top1


def _start(
    cfg: DictConfig, resume: Checkpoint | None, recipe: QuantRecipe, data: ImageData, trainer: Trainer, optimizer: OptimizerFactory
) -> Start:
    """The net, quantized, on its device, as the run begins or goes on."""
    if resume:
        check_data(cfg, resume, data)
        start = build.build_resumed(resume)
    else:
        start = build.build_start(cfg)
        if start.source is not None:
            check_classes(start.source, data, f"ckpt={str(cfg.ckpt)!r}")
    check_patches(start.net, data)
    check_classifier(start.net, data)
    start.net.to(trainer.strategy.root_device)
    if resume:
        check_optimizer(resume, optimizer(start.net))
    else:
        start.notes += build.quantize(start, recipe, data, init=cfg.model.init, processes=trainer.world_size)
    options.use_less_memory(cfg, start.net)
    return start


def _seconds_since(began: float, trainer: Trainer) -> float:
    """Seconds of this process, and of the training before the checkpoint that it was resumed from."""
    earlier = next((one.earlier_seconds for one in trainer.checkpoint_callbacks if isinstance(one, LastCheckpoint)), 0.0)
    return round(time.monotonic() - began + earlier, 1)


def _take_directory(cfg: DictConfig, replaced: list[Path]) -> None:
    """Remove what an older run left, and write whose directory it is now, with which settings."""
    for path in replaced:
        path.unlink(missing_ok=True)
    write_owner(Path(cfg.run_dir))
    record_run(cfg)


def _describe(cfg: DictConfig, start: Start, data: ImageData) -> dict[str, Any]:
    """What checkpoints of the run say of its net, and of the run for whoever goes on with it."""
    args = build.model_args(cfg)
    said = describe(start.net, model=cfg.model.name, model_kwargs=args, data=build.plain(cfg.data), classes=data.named_classes())
    return said | {"run": {"settings": compared(cfg), "images": data.fingerprints()}}


def _take_best(module: QATModule, data: ImageData, trainer: Trainer) -> tuple[float, str]:
    """Put the weights of `best.ckpt` into the module; the final ones stay where no checkpoint was written."""
    best = next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor and c.best_model_path), None)  # type: ignore[attr-defined]
    if best is None or best.best_model_score is None:
        if module.validated_at != trainer.global_step:
            _validate_again(module, data, trainer)
        return float(trainer.callback_metrics.get("val/top1", torch.tensor(torch.nan))), "final"
    module.net.load_state_dict(build_from(read_checkpoint(best.best_model_path)).state_dict())
    score = best.best_model_score
    if best.monitor != "val/top1":
        _validate_again(module, data, trainer)
        score = trainer.callback_metrics.get("val/top1", score)
    return float(score), Path(best.best_model_path).name


def _validate_again(module: QATModule, data: ImageData, trainer: Trainer) -> None:
    """For a score that no validation of this process has given of these weights; the rows of metrics are there already."""
    loggers, trainer.loggers = trainer.loggers, []
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.loggers = loggers


def _test(cfg: DictConfig, recipe: QuantRecipe, data: ImageData, module: QATModule, trainer: Trainer, outcome: dict[str, Any]) -> None:
    """Evaluate the weights now in the module, write `results.json`, say where things are."""
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    with torch.compiler.set_stance("force_eager"):  # its hooks belong to no compiled graph
        costs = cost(module.net, data.input_size)
    results = write_results(
        cfg,
        **recipe_fields(recipe),
        **measured(metrics, costs),
        **data.evaluation_facts(module.confusion),
        **outcome,
        **({"left_out": left_out} if (left_out := data.left_out()) else {}),
    )
    if left_out:
        log.warning("data.on_error=skip: %s could not be decoded", ", ".join(f"{n} {split} images" for split, n in left_out.items()))
    scores = f"top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % ({results['weights']})"
    log.info("%s %s; %d bytes as stored", results["split"], scores, costs.size_bytes)
    log.info("outputs in %s", cfg.run_dir)
