"""`train.py`: build and train a model, evaluate its best weights, and write `results.json`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from omegaconf import DictConfig

from qat.callbacks import CGA, LastCheckpoint
from qat.data import ImageData
from qat.launch.ranks import connect, is_first
from qat.launch.slurm import write_owner
from qat.lit import QATModule
from qat.lit.loggers import end_wandb_runs
from qat.lit.module import OptimizerFactory
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.cost import cost
from qat.model.metadata import describe
from qat.model.start import Start
from qat.model.storage import build_from
from qat.spec import QuantRecipe
from qat.tasks import build, fit, summary
from qat.tasks.checks import (
    check_classes,
    check_classifier,
    check_combinations,
    check_patches,
)
from qat.tasks.report import report_run
from qat.tasks.results import (
    correct_field,
    recipe_fields,
    record_run,
    score_fields,
    write_class_tables,
    write_results,
)
from qat.tasks.resume import (
    check_data,
    check_optimizer,
    check_teacher,
    comparable_settings,
    find_resume,
    outputs_to_replace,
)
from qat.tasks.set_up import set_up
from qat.tasks.subject import class_names
from qat.tasks.summary import announce_run, announce_teacher
from qat.tasks.teacher import build_teacher, warn_of_normalization
from qat.utils.files import hash_tensors

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float:
    """Train one model.

    All settings are checked before the first training step.

    Args:
        cfg: config composed from `conf/train.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Validation top-1 in percent of the best checkpoint, or of the final weights if there is no
        best checkpoint; NaN without validation.

    Raises:
        UsageError: a setting, path or file cannot be used; during training: a loss, gradient or
            weight is not finite, or a checkpoint cannot be written.
    """
    start_time = time.monotonic()
    set_up(cfg)
    build.import_modules(cfg.model.imports)

    recipe = build.build_recipe(cfg)
    loss = build.build_loss(cfg)
    model_args = build.model_args(cfg)
    check_combinations(cfg.trainer, cfg.compile, recipe, loss)
    resume_checkpoint = find_resume(cfg, recipe, model_args)
    settings = comparable_settings(cfg)
    outdated_files = [] if resume_checkpoint else outputs_to_replace(cfg)
    if cfg.trainer.fast_dev_run:  # writes no checkpoints, so the old ones stay
        outdated_files = []
    callbacks = fit.build_callbacks(cfg)
    first_step = (resume_checkpoint.step or 0) if resume_checkpoint else 0
    loggers = fit.build_loggers(cfg, resume_step=first_step)
    trainer = fit.build_trainer(cfg, callbacks, loggers)
    optimizer_factory = fit.build_optimizer_factory(cfg, trainer)
    scheduler_factory = fit.build_scheduler_factory(cfg)

    data = build.build_data(cfg)
    data.batch_mixup()  # fails early if a mixup setting is invalid
    start = _build_start(cfg, resume_checkpoint, recipe, data, trainer, optimizer_factory)
    fit.use_less_memory(cfg, start.net)
    teacher = build_teacher(cfg, loss, data)
    teacher_digest = None if teacher is None else hash_tensors(teacher.net.state_dict().values())
    if resume_checkpoint:
        check_teacher(resume_checkpoint, teacher_digest)
    metadata = describe(
        start.net,
        model=cfg.model.name,
        model_kwargs=model_args,
        data=build.to_plain(cfg.data),
        classes=data.named_classes(),
    )
    # This entry is stored so that a resumed run can be compared with this run.
    metadata["run"] = {
        "settings": settings,
        "images": data.fingerprints(),
        "teacher": teacher_digest,
    }
    module = QATModule(
        start.net,
        loss,
        num_classes=data.settings.num_classes,
        optimizer=optimizer_factory,
        scheduler=scheduler_factory,
        teacher=teacher,
        lsq_grad_batch=cfg.lsq_grad_batch,
        describe=metadata,
    )

    connect(trainer)
    data.share_images(trainer)
    _check_annealing(cfg, callbacks, data, trainer)
    if is_first():
        _begin_run_dir(cfg, outdated_files)
        lr = optimizer_factory.keywords["lr"]
        announce_run(cfg, recipe, data, start, module, trainer, lr)
    teacher_top1 = announce_teacher(teacher, data, trainer)
    fit.compile_nets(cfg, module.net, teacher)
    with end_wandb_runs(trainer.loggers):
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=str(resume_checkpoint.path) if resume_checkpoint else None,
        )
        module.unshard_net()
        val_top1, weights = _load_best_weights(module, data, trainer)
        (metrics,) = trainer.test(module, datamodule=data, verbose=False)

    outcome = {
        "weights": weights,
        "val_top1": val_top1,
        "top1_fp": teacher_top1,
        "wall_seconds": round(time.monotonic() - start_time + _earlier_seconds(trainer), 1),
    }
    _write_results(cfg, recipe, module, data, metrics, outcome)
    return val_top1


def _check_annealing(
    cfg: DictConfig, callbacks: Sequence[Callback], data: ImageData, trainer: Trainer
) -> None:
    steps = fit.steps_per_epoch(cfg, data)
    for callback in callbacks:
        if isinstance(callback, CGA):
            callback.check_steps(trainer, cfg.trainer.get("max_steps", -1), steps)


def _begin_run_dir(cfg: DictConfig, outdated_files: Iterable[Path]) -> None:
    for path in outdated_files:
        path.unlink(missing_ok=True)
    write_owner(Path(cfg.run_dir))
    record_run(cfg)


def _earlier_seconds(trainer: Trainer) -> float:
    """Seconds of the run before it was resumed."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, LastCheckpoint):
            return callback.earlier_seconds
    return 0.0


def _write_results(
    cfg: DictConfig,
    recipe: QuantRecipe,
    module: QATModule,
    data: ImageData,
    metrics: Mapping[str, float],
    outcome: Mapping[str, Any],
) -> None:
    """Write `results.json`, class tables and the report; log one line with the scores."""
    with torch.compiler.set_stance("force_eager"):  # hooks do not work in compiled graphs
        costs = cost(module.net, data.input_size)
    measurements = score_fields(metrics, costs, data.settings.num_classes)
    measurements |= correct_field(module.correct)
    measurements |= data.evaluation_facts(module.confusion)
    if module.confusion is not None:
        names = class_names(None, data)
        measurements |= write_class_tables(Path(cfg.run_dir), module.confusion, names)
    results = write_results(cfg, **recipe_fields(recipe), **measurements, **outcome)
    score_texts = [
        f"{key} {text}".removeprefix("note ") for key, text in summary.score_texts(results).items()
    ]
    log.info(
        "%s %s (%s); %s; outputs in %s",
        results["split"],
        ", ".join(score_texts),
        outcome["weights"],
        summary.describe_size(module.net, costs.size_bytes),
        cfg.run_dir,
    )
    report_run(cfg, module.net, data.input_size)


def _build_start(
    cfg: DictConfig,
    resume_checkpoint: Checkpoint | None,
    recipe: QuantRecipe,
    data: ImageData,
    trainer: Trainer,
    optimizer_factory: OptimizerFactory,
) -> Start:
    """The model to train, on the trainer's device; new, or from the checkpoint of a resumed run."""
    if resume_checkpoint:
        check_data(resume_checkpoint, data, allow_changed_data=cfg.allow_changed_data)
        note = f"step {resume_checkpoint.step} of this run ({resume_checkpoint.path.name})"
        start = Start(build_from(resume_checkpoint).train(), [note])
    else:
        start = build.build_start(cfg)
        if start.source is not None:
            check_classes(start.source, data, f"ckpt={str(cfg.ckpt)!r}")
        warn_of_normalization(start, cfg, data)
    check_patches(start.net, data)
    check_classifier(start.net, data)
    start.net.to(trainer.strategy.root_device)
    if resume_checkpoint:
        check_optimizer(resume_checkpoint, optimizer_factory(start.net))
    else:
        start.notes += build.quantize(
            start, recipe, data, init=cfg.model.init, processes=trainer.world_size
        )
    return start


def _load_best_weights(module: QATModule, data: ImageData, trainer: Trainer) -> tuple[float, str]:
    """Load the weights of the best checkpoint, or keep the final weights if there is none.

    Returns:
        Validation top-1 of these weights in percent (NaN without validation), and the name of their
        file, or "final".
    """
    name = "final"
    best_callback = _best_callback(trainer)
    if best_callback is not None:
        best_net = build_from(read_checkpoint(best_callback.best_model_path))
        module.net.load_state_dict(best_net.state_dict())
        name = Path(best_callback.best_model_path).name
        if best_callback.monitor == "val/top1":
            return float(best_callback.best_model_score), name
    # Validate without loggers, which already have these metrics, and without weight averaging,
    # which would replace the loaded weights.
    loggers = trainer.loggers
    trainer.loggers = []
    untyped_trainer: Any = trainer  # Lightning does not declare `callbacks`
    untyped_trainer.callbacks = [
        c for c in untyped_trainer.callbacks if not isinstance(c, WeightAveraging)
    ]
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.loggers = loggers
    return float(trainer.callback_metrics.get("val/top1", torch.nan)), name


def _best_callback(trainer: Trainer) -> Any:
    """Return the first checkpoint callback that has a best score of a metric, or None."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not callback.monitor:
            continue
        if callback.best_model_score is not None:
            return callback
    return None
