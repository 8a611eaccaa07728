"""`train.py`: build, train, evaluate the best checkpoint, write `results.json`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor

from qat.callbacks import Stopwatch
from qat.cli.repeat import recorded
from qat.cli.results import measured, recipe_fields, write_results
from qat.data import ImageData
from qat.launch import outputs
from qat.launch.group import connect
from qat.launch.outputs import UsedError
from qat.launch.ranks import is_first
from qat.launch.slurm import write_owner
from qat.lit import QATModule, Teacher
from qat.lit.accuracy import evaluate
from qat.lit.loggers import closing
from qat.model.checkpoint import build_from, describe, read_checkpoint
from qat.model.convert import conversion_report
from qat.model.cost import cost
from qat.model.start import Start
from qat.spec import QuantRecipe
from qat.tasks import build, fit, options, summary
from qat.tasks.checks import check_classifier, check_patches, check_settings
from qat.tasks.compare import compared
from qat.tasks.report import record_command, report_run
from qat.tasks.resume import Resume, check_data, check_optimizer, find_resume
from qat.tasks.teacher import build_teacher, is_float
from qat.tasks.trainer_checks import check_batches
from qat.utils.files import write_text

log = logging.getLogger(__name__)

HEAD_GAP = 1.0  # points of top-1


@dataclass(frozen=True)
class TrainRun:
    """Everything that a training run is made of, built and checked.

    Attributes:
        resume: where it goes on, None = it starts.
        replaces: outputs of an older run in its directory.
    """

    resume: Resume | None
    replaces: list[Path]
    start: Start
    recipe: QuantRecipe
    data: ImageData
    teacher: Teacher | None
    module: QATModule
    trainer: Trainer


def train(cfg: DictConfig) -> float:
    """Train one net.

    Args:
        cfg: composed from `conf/train.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Best validation top-1 in percent (of the final weights under `fast_dev_run`).

    Raises:
        UsageError: a setting, path or file cannot work; raised before the first step.
    """
    began = time.monotonic()
    run = _build(cfg)
    connect(run.trainer, build.plain(cfg))
    run.data.trainer = run.trainer  # from here on each process has its own share of the images
    if is_first():
        for path in run.replaces:
            path.unlink(missing_ok=True)
        write_owner(Path(cfg.run_dir))
        _announce(cfg, run)
        write_text(Path(cfg.run_dir) / "config.yaml", recorded(cfg))
        record_command(cfg)
    top1_fp = _announce_teacher(run)
    options.compile_nets(cfg, run.module.net, run.teacher)
    with closing(run.trainer.loggers):
        run.trainer.fit(run.module, datamodule=run.data, ckpt_path=run.resume.path if run.resume else None)
        run.module.make_whole()
        _announce_early_end(run.trainer)
        val_top1, weights = _take_best(run)
        watch = next(c for c in run.trainer.callbacks if isinstance(c, Stopwatch))  # type: ignore[attr-defined]
        seconds = time.monotonic() - began + watch.earlier_seconds
        _conclude(cfg, run, {"weights": weights, "val_top1": val_top1, "top1_fp": top1_fp, "wall_seconds": round(seconds, 1)})
    report_run(cfg, run.module.net, run.data.input_size, is_first=run.trainer.is_global_zero)
    return val_top1


def _build(cfg: DictConfig) -> TrainRun:
    """Settings first, then what costs time: a mistake in the last of them shows before the first image is read."""
    check_settings(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    build.import_modules(cfg)
    recipe, loss = build.build_recipe(cfg), build.build_loss(cfg)
    resume = find_resume(cfg, recipe, build.model_args(cfg))
    replaces = [] if resume else _outputs_of_an_old_run(cfg)
    scheduler = fit.build_scheduler_factory(cfg)
    loggers = fit.build_loggers(cfg, resume.rows if resume else [])
    trainer = fit.build_trainer(cfg, fit.build_callbacks(cfg), loggers)
    optimizer = fit.build_optimizer_factory(cfg, trainer)
    options.check_precision(cfg, recipe)
    options.check_loss(cfg, loss)
    options.check_compiler(cfg, trainer.strategy.root_device)
    data = build.build_data(cfg)
    data.batch_mixup()  # refuses what cannot be mixed before an image is read
    start = _resumed(cfg, resume, data) if resume else build.build_start(cfg)
    check_patches(start.net, data)
    check_classifier(start.net, data)
    start.net.to(trainer.strategy.root_device)
    if not resume:
        start.notes += build.quantize(start, recipe, data, init=cfg.model.init, processes=trainer.world_size)
        optimizer = fit.take_optimizer_state(cfg, optimizer, start)
    else:
        check_optimizer(resume.checkpoint, optimizer(start.net))
    options.use_less_memory(cfg, start.net)
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
    return TrainRun(resume, replaces, start, recipe, data, teacher, module, trainer)


def _resumed(cfg: DictConfig, resume: Resume, data: ImageData) -> Start:
    check_data(cfg, resume.checkpoint, data)
    return build.build_resumed(resume.checkpoint)


def _describe(cfg: DictConfig, start: Start, data: ImageData) -> dict[str, Any]:
    """What checkpoints of the run say of its net, and of the run for whoever goes on with it."""
    args = build.model_args(cfg)
    said = describe(start.net, model=cfg.model.name, model_kwargs=args, data=build.plain(cfg.data), classes=data.named_classes())
    return said | {"run": {"settings": compared(cfg), "images": data.fingerprints()}}


def _conclude(cfg: DictConfig, run: TrainRun, outcome: dict[str, Any]) -> None:
    """Evaluate the weights now in the module, write `results.json`, say where things are."""
    (metrics,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    with torch.compiler.set_stance("force_eager"):  # its hooks belong to no compiled graph
        costs = cost(run.module.net, run.data.input_size)
    results = write_results(
        cfg,
        **recipe_fields(run.recipe),
        **measured(metrics, costs),
        split=run.data.evaluation_split,
        **outcome,
        **({"left_out": left_out} if (left_out := run.data.left_out()) else {}),
    )
    if left_out:
        log.warning("data.on_error=skip: %s could not be decoded", ", ".join(f"{n} {split} images" for split, n in left_out.items()))
    scores = f"top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % ({results['weights']})"
    log.info("%s %s; %d bytes as stored", results["split"], scores, costs.size_bytes)
    log.info("outputs in %s", cfg.run_dir)


def _outputs_of_an_old_run(cfg: DictConfig) -> list[Path]:
    """What a new run in a used directory replaces, once everything is checked and a `ckpt` from there is in memory.

    Raises:
        UsedError: there are files of another run, and they may not be overwritten.
    """
    run_dir = Path(cfg.run_dir)
    used = outputs.used(run_dir)
    checkpoints = [path.name for path in outputs.checkpoints(run_dir)]
    if checkpoints and cfg.trainer.fast_dev_run:
        raise UsedError(
            f"trainer.fast_dev_run: run_dir={str(run_dir)!r} holds {checkpoints[0]}, which a dry run leaves alone; choose another run_dir"
        )
    # A run that was killed before its first last.ckpt has nothing to go on from.
    unsaved = checkpoints == ["best.ckpt"] or not (checkpoints or outputs.is_finished(run_dir))
    if used and not (cfg.overwrite or (cfg.resume == "auto" and unsaved)):
        raise UsedError(f"run_dir={str(run_dir)!r} holds {used[0].name} already; choose another run_dir or set overwrite=true")
    return outputs.replaced(run_dir)


def _announce(cfg: DictConfig, run: TrainRun) -> None:
    trainer = run.trainer
    batch = fit.global_batch(cfg, trainer)
    optimizer = f"{cfg.optimizer.opt} {summary.describe_lr(cfg, batch)}, weight decay {cfg.optimizer.weight_decay:g}"
    entries = {
        "model": summary.describe_model(cfg.model.name, run.start.net, run.data),
        "recipe": summary.describe_recipe(run.recipe),
        "data": summary.describe_data(type(run.data).__name__.lower(), run.data),
        "start": "; ".join(run.start.notes),
        "loss": ", ".join(run.module.loss.terms),
        "training": f"{cfg.trainer.max_epochs} epochs, global batch {batch}, {optimizer}, seed {cfg.seed}",
        "device": f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}, precision {trainer.precision}",
        "outputs": str(cfg.run_dir),
    }
    log.info(summary.lines("qat: training", entries))
    if not (cfg.trainer.fast_dev_run or any(isinstance(c, Checkpointing) for c in trainer.callbacks)):  # type: ignore[attr-defined]
        log.warning("callbacks: none of them writes checkpoints, so no file will hold this net; callbacks=[default,...] has them")
    if run.recipe.name != "fp":
        report = conversion_report(run.start.net)
        write_text(Path(cfg.run_dir) / "conversion.txt", report.to_text() + "\n")
        log.info(summary.compact(report))


def _announce_teacher(run: TrainRun) -> float | None:
    """Evaluate the teacher once: a wrong teacher is the most expensive mistake of a distillation run."""
    if run.teacher is None:
        return None
    device = run.trainer.strategy.root_device
    run.teacher.to(device)
    nets: list[Callable[[Tensor], Tensor]] = [run.teacher, run.teacher.net] if run.teacher.is_one_of_two else [run.teacher]
    followed, *whole = (evaluate(net, run.data.test_dataloader(), run.data.settings.num_classes, device)["top1"] for net in nets)
    own = whole[0] if whole else followed
    beside = f", its class head alone; {own:.2f} % with both heads" if whole else ""
    log.info("teacher: %s top-1 %.2f %%%s", run.data.evaluation_split, followed, beside)
    if own - followed > HEAD_GAP:
        log.warning("loss.teacher_head=cls: that head alone is %.1f points behind the net; mean follows both", own - followed)
    return own if is_float(run.teacher) else None


def _announce_early_end(trainer: Trainer) -> None:
    """Say why a run is shorter than it was to be."""
    stops = [c for c in trainer.callbacks if isinstance(c, EarlyStopping) and c.stopping_reason_message]  # type: ignore[attr-defined]
    if not (trainer.should_stop and stops):
        return
    why = str(stops[0].stopping_reason_message).removesuffix(" Signaling Trainer to stop.").removesuffix(".")
    best = next((c.best_model_path for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path), "none")  # type: ignore[attr-defined]
    epochs = f"{trainer.current_epoch} of {trainer.max_epochs} epochs"
    log.info("stopped early at step %d, behind %s: %s; best checkpoint: %s", trainer.global_step, epochs, why, best)


def _validate_again(run: TrainRun) -> None:
    """For a score that no validation of this process has given; the rows of metrics are there already."""
    loggers, run.trainer.loggers = run.trainer.loggers, []
    run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    run.trainer.loggers = loggers


def _take_best(run: TrainRun) -> tuple[float, str]:
    """Put the weights of `best.ckpt` into the module; the final ones stay where no checkpoint was written."""
    trainer = run.trainer
    best = next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor and c.best_model_path), None)  # type: ignore[attr-defined]
    if best is None or best.best_model_score is None:
        if run.resume and "val/top1" not in trainer.callback_metrics:
            _validate_again(run)
        return float(trainer.callback_metrics.get("val/top1", torch.tensor(torch.nan))), "final"
    run.module.net.load_state_dict(build_from(read_checkpoint(best.best_model_path)).state_dict())
    score = best.best_model_score
    if best.monitor != "val/top1":
        _validate_again(run)
        score = trainer.callback_metrics.get("val/top1", score)
    return float(score), Path(best.best_model_path).name
