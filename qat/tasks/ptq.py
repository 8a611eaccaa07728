"""`ptq.py`: quantize a net after its training: calibrate or keep what it has, search, evaluate, write `quantized.ckpt`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn

from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.ranks import connect, is_first
from qat.launch.run_dir import UsedError
from qat.lit.loggers import closing
from qat.model.checkpoint import classes_of, save
from qat.model.convert import convert
from qat.model.cost import cost
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate, in_float
from qat.ptq.distributed import Ranks
from qat.ptq.search_settings import SearchSettings
from qat.spec import recipe as preset
from qat.tasks import build, fit, summary
from qat.tasks.checks import check_settings
from qat.tasks.evaluate import build_subject, measure, origin
from qat.tasks.predict import EvaluatedNet
from qat.tasks.ptq_keep import build_target_net, check_start, is_kept
from qat.tasks.report import report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.tasks.search import Fitter, build_fitter, build_search, check_targets, run_search
from qat.utils.validate import check_int

log = logging.getLogger(__name__)

FILE = "quantized.ckpt"


@dataclass(frozen=True)
class PtqRun:
    """Everything that a run is made of, built and checked.

    Attributes:
        subject: the float net.
        quantized: a copy of it that is converted, its scales are filled later on; under `ptq=keep` the net as it came, and `subject` too.
        search: what follows the calibration, None = nothing.
        batches: calibration images, (batch, C, H, W) each.
        teacher: the net whose logits a search comes close to; None = `subject`, in float.
        fitter: changes the weights behind the calibration, None = they stay.
    """

    subject: EvaluatedNet
    quantized: EvaluatedNet
    search: SearchSettings | None
    batches: list[Tensor]
    trainer: Trainer
    teacher: nn.Module | None
    fitter: Fitter | None = None

    @property
    def keeps(self) -> bool:
        """The net was quantized already."""
        return self.subject is self.quantized


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
    run = _build(cfg)
    connect(run.trainer)
    if is_first():
        _remove_older(cfg)
        record_run(cfg)
        _announce(cfg, run)
    with closing(run.trainer.loggers):
        results = _quantize(cfg, run, began)
    subject = run.quantized
    report_run(cfg, subject.net, subject.data.input_size, is_first=run.trainer.is_global_zero)
    return float(results["top1"])


def _quantize(cfg: DictConfig, run: PtqRun, began: float) -> dict[str, Any]:
    """Do all of it, evaluate, and write what came of it; gives the results."""
    subject, net = run.quantized, run.quantized.net
    top1_fp = _measure_float(run)
    figures = {"top1_start": _measure(run.trainer, run.subject, "quantized, as it came,")["top1"]} if run.keeps else {}
    net.to(run.trainer.strategy.root_device)
    ranks = Ranks(dist.group.WORLD) if dist.is_initialized() else Ranks()
    figures["calibration"] = None if run.keeps else _calibrate(run, ranks)
    teacher = run.teacher
    if run.fitter is not None:
        # What comes behind has to follow the float net as it was: the weights of this one change.
        teacher = run.subject.net.to(run.trainer.strategy.root_device).eval()
        figures["top1_calibrated"] = _measure(run.trainer, subject, "calibrated")["top1"]
        figures |= run.fitter(net, teacher, run.batches, run.trainer)
    elif run.search is not None and not run.keeps:
        figures["top1_calibrated"] = _measure(run.trainer, subject, "calibrated")["top1"]
    figures |= run_search(cfg, run.search, subject, run.batches, run.trainer, ranks, teacher=teacher)
    if not cfg.trainer.fast_dev_run and run.trainer.is_global_zero:
        classes = classes_of(net) or subject.data.named_classes()
        save(net, Path(cfg.run_dir) / FILE, model=subject.name, data=build.plain(cfg.data), classes=classes)
    found = _measure(run.trainer, subject, "quantized")
    outcome = {"weights": origin(cfg), "top1_fp": top1_fp, "wall_seconds": round(time.monotonic() - began, 1)}
    results = write_results(cfg, model=subject.name, **recipe_fields(subject.recipe), **found, **figures, **outcome)
    log.info("%s top-1 %.2f %% in float, %.2f %% quantized; outputs in %s", found["split"], top1_fp, found["top1"], cfg.run_dir)
    return results


def build_ptq_recipe(cfg: DictConfig) -> PtqRecipe:
    """The recipe of `cfg.ptq`.

    Raises:
        UsageError: it has a key that is no knob, or a value that cannot work.
    """
    knobs = {key: value for key, value in build.plain(cfg.ptq).items() if key not in {"batch", "reconstruct"}}
    return build.settings_of(PtqRecipe, "ptq", knobs)


def calibration_batches(cfg: DictConfig, data: ImageData) -> list[Tensor]:
    """Training images in whole batches of `ptq.batch`; a rest that fills none is left out.

    Raises:
        UsageError: there are too few images for one batch.
    """
    wanted, size = data.settings.calibration_images, cfg.ptq.batch
    if wanted < size:
        raise UsageError(f"data.calibration_images={wanted}: less than one batch; must be an integer of at least ptq.batch={size}")
    batches = [batch for batch in data.calibration_batches(size) if len(batch) == size]
    if not batches:
        raise UsageError(f"ptq.batch={size}: the data have {len(data.split('train'))} training images, which fill no batch of this size")
    return batches


def _build(cfg: DictConfig) -> PtqRun:
    check_settings(cfg)
    check_int("ptq.batch", cfg.ptq.batch, 1)
    recipe, search = None if is_kept(cfg) else build_ptq_recipe(cfg), build_search(cfg)
    _refuse_used(cfg)
    build.import_modules(cfg)
    subject = build_subject(cfg)
    check_start(cfg, subject, search)
    teacher = build_target_net(cfg, subject)
    batches = calibration_batches(cfg, subject.data)
    trainer = fit.build_trainer(cfg, [], fit.build_loggers(cfg))
    quantized = subject
    if recipe is not None:
        net = convert(copy.deepcopy(subject.net), recipe, input_size=subject.data.input_size)
        quantized = dataclasses.replace(subject, net=net, recipe=recipe)
    check_targets(search, quantized.net)
    fitter = build_fitter(cfg, recipe, batches, trainer)
    return PtqRun(subject, quantized, search, batches, trainer, teacher, fitter)


def _remove_older(cfg: DictConfig) -> None:
    """Delete the net of a run that this one replaces, unless it is what this one starts from: then it is there until the new one is."""
    older = Path(cfg.run_dir) / FILE
    starts = [Path(path) for path in (cfg.ckpt, cfg.teacher.ckpt) if path]
    if not any(start.exists() and older.exists() and start.samefile(older) for start in starts):
        older.unlink(missing_ok=True)


def _refuse_used(cfg: DictConfig) -> None:
    run_dir = Path(cfg.run_dir)
    if cfg.overwrite:
        return
    if cfg.resume:
        outputs.check_own(run_dir, cfg.command, origin(cfg))
        return
    used = outputs.used(run_dir)
    if used:
        held = next((path for path in reversed(used) if path.suffix == ".ckpt"), used[0]).relative_to(run_dir)
        raise UsedError(f"run_dir={str(run_dir)!r} holds {held} already; choose another run_dir or set overwrite=true")


def _announce(cfg: DictConfig, run: PtqRun) -> None:
    data, trainer = run.subject.data, run.trainer
    entries = {
        "model": summary.describe_model(run.subject.name, run.subject.net, data.input_size),
        "recipe": summary.describe_recipe(run.quantized.recipe),
        "data": summary.describe_data(type(data).__name__.lower(), data),
        (
            "targets" if run.keeps else "calibration"
        ): f"{len(run.batches)} batches of {cfg.ptq.batch} training images, seed {data.settings.seed}",
        "weights": origin(cfg),
        "device": f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}",
        "outputs": str(cfg.run_dir),
    }
    log.info(summary.lines("qat: post-training quantization", entries))
    log.info(summary.conversion(run.quantized.net, Path(cfg.run_dir)))


def _measure(trainer: Trainer, subject: EvaluatedNet, what: str) -> dict[str, Any]:
    """Evaluate a net, which is on the trainer's device then: keys of `results.json`."""
    log.info("%s net", what)
    found = measure(subject, trainer, cost(subject.net, subject.data.input_size))
    subject.net.to(trainer.strategy.root_device)  # Lightning takes it to the CPU at the end of a test
    return found


def _measure_float(run: PtqRun) -> float:
    """Top-1 in percent of the net that gives the targets."""
    subject = run.subject if run.teacher is None else dataclasses.replace(run.subject, net=run.teacher, recipe=preset("fp"))
    with in_float(subject.net):
        return float(_measure(run.trainer, subject, "float")["top1"])


def _calibrate(run: PtqRun, ranks: Ranks) -> dict[str, Any]:
    """Fill the scales; gives what `results.json` says of it."""
    began = time.monotonic()
    count = len(run.batches)
    if ranks.world > count:
        raise UsageError(
            f"trainer.devices={ranks.world}: {count} batches of calibration images leave some with none; must be at most {count}"
        )
    done = calibrate(run.quantized.net, [run.batches[i] for i in ranks.own(count)], ranks=ranks)
    seconds, images = round(time.monotonic() - began, 2), sum(len(batch) for batch in run.batches)
    log.info("%d scales from %d images in %.1f s", done.scales, images, seconds)
    all_of_them = {"images": images, "batches": count, "seconds": seconds, "seed": run.subject.data.settings.seed}
    return dataclasses.asdict(done) | all_of_them
