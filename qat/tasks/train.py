"""`train.py`: build, train, evaluate the best checkpoint, write `results.json`."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from qat.checkpoint import build_from, describe, read_checkpoint
from qat.conversion import conversion_report
from qat.cost import cost
from qat.data import ImageData
from qat.errors import UsageError
from qat.files import write_text
from qat.lit import QATModule, Teacher
from qat.lit.evaluate import evaluate
from qat.lit.loggers import close
from qat.spec import QuantRecipe, check_whole
from qat.start import Start
from qat.tasks import build, summary
from qat.tasks.results import measured, recipe_fields, write_results
from qat.tasks.resume import Resume, find_resume
from qat.tasks.teacher import build_teacher, is_float

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
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
    for path in run.replaces:
        path.unlink()
    _announce(cfg, run)
    write_text(Path(cfg.run_dir) / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    top1_fp = _announce_teacher(run)
    run.trainer.fit(run.module, datamodule=run.data, ckpt_path=run.resume.path if run.resume else None)
    val_top1, weights = _take_best(run.trainer, run.module)
    _conclude(cfg, run, {"weights": weights, "val_top1": val_top1, "top1_fp": top1_fp, "wall_seconds": round(time.monotonic() - began, 1)})
    close(run.trainer.loggers)
    return val_top1


def _build(cfg: DictConfig) -> Run:
    """Settings first, then what costs time: a mistake in the last of them shows before the first image is read."""
    check_whole("seed", cfg.seed, 0)
    seed_everything(cfg.seed, workers=True, verbose=False)
    build.import_modules(cfg)
    recipe, loss = build.build_recipe(cfg), build.build_loss(cfg)
    resume = find_resume(cfg, recipe, build.model_args(cfg))
    replaces = [] if resume else _outputs_of_an_old_run(Path(cfg.run_dir), overwrite=bool(cfg.overwrite))
    optimizer, scheduler = build.build_optimizer_factory(cfg), build.build_scheduler_factory(cfg)
    loggers = build.build_loggers(cfg, resume.rows if resume else [])
    trainer = build.build_trainer(cfg, build.build_callbacks(cfg), loggers)
    data = build.build_data(cfg)
    start = build.build_resumed(resume.checkpoint) if resume else build.build_start(cfg)
    start.net.to(trainer.strategy.root_device)
    if not resume:
        start.notes += build.quantize(start, recipe, data, init=cfg.model.init)
    teacher = build_teacher(cfg, loss, data)
    module = QATModule(
        start.net,
        loss,
        num_classes=data.settings.num_classes,
        optimizer=optimizer,
        scheduler=scheduler,
        teacher=teacher,
        lsq_grad_batch=cfg.lsq_grad_batch,
        describe=describe(start.net, model=cfg.model.name, model_kwargs=build.model_args(cfg), data=build.plain(cfg.data)),
    )
    return Run(resume, replaces, start, recipe, data, teacher, module, trainer)


def _conclude(cfg: DictConfig, run: Run, outcome: dict[str, Any]) -> None:
    """Evaluate the weights now in the module, write `results.json`, say where things are."""
    (metrics,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    costs = cost(run.module.net, run.data.input_size)
    results = write_results(
        cfg,
        **recipe_fields(run.recipe),
        **measured(metrics, costs),
        split=run.data.evaluation_split,
        **outcome,
    )
    scores = f"top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % ({results['weights']})"
    log.info("%s %s; %d bytes as stored", results["split"], scores, costs.size_bytes)
    log.info("outputs in %s", cfg.run_dir)


def _outputs_of_an_old_run(run_dir: Path, *, overwrite: bool) -> list[Path]:
    """What a new run in a used directory replaces, once everything is checked and a `ckpt` from there is in memory.

    Raises:
        UsageError: there are checkpoints, and they may not be overwritten.
    """
    used = sorted((run_dir / "checkpoints").glob("*.ckpt"))
    if used and not overwrite:
        raise UsageError(f"run_dir={str(run_dir)!r} holds {used[0].name} already; choose another run_dir or set overwrite=true")
    events = sorted(run_dir.glob("events.out.tfevents.*"))
    return used + events + [path for name in ("results.json", "metrics.csv") if (path := run_dir / name).is_file()]


def _announce(cfg: DictConfig, run: Run) -> None:
    trainer = run.trainer
    batch = cfg.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    optimizer = f"{cfg.optimizer.opt} lr {cfg.optimizer.lr:.3g}, weight decay {cfg.optimizer.weight_decay:g}"
    entries = {
        "model": summary.describe_model(cfg.model.name, run.start.net, run.data),
        "recipe": summary.describe_recipe(run.recipe),
        "data": summary.describe_data(type(run.data).__name__.lower(), run.data),
        "start": "; ".join(run.start.notes),
        "loss": ", ".join(cfg.loss.terms),
        "training": f"{cfg.trainer.max_epochs} epochs, global batch {batch}, {optimizer}, seed {cfg.seed}",
        "device": f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}, precision {trainer.precision}",
        "outputs": str(cfg.run_dir),
    }
    log.info(summary.lines("qat: training", entries))
    if run.recipe.name != "fp":
        report = conversion_report(run.start.net)
        write_text(Path(cfg.run_dir) / "conversion.txt", report.to_text() + "\n")
        log.info(summary.compact(report))


def _announce_teacher(run: Run) -> float | None:
    """Evaluate the teacher once: a wrong teacher is the most expensive mistake of a distillation run."""
    if run.teacher is None:
        return None
    device = run.trainer.strategy.root_device
    run.teacher.to(device)
    scores = evaluate(run.teacher, run.data.test_dataloader(), run.data.settings.num_classes, device)
    log.info("teacher: %s top-1 %.2f %% (its %s head)", run.data.evaluation_split, scores["top1"], run.teacher.head)
    return scores["top1"] if is_float(run.teacher) else None


def _take_best(trainer: Trainer, module: QATModule) -> tuple[float, str]:
    """Put the weights of `best.ckpt` into the module; the final ones stay where no checkpoint was written."""
    best = next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor and c.best_model_path), None)  # type: ignore[attr-defined]
    if best is None or best.best_model_score is None:
        return float(trainer.callback_metrics.get("val/top1", torch.tensor(torch.nan))), "final"
    module.net.load_state_dict(build_from(read_checkpoint(best.best_model_path)).state_dict())
    return float(best.best_model_score), Path(best.best_model_path).name
