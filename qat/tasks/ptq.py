"""`ptq.py`: quantize a net after its training: calibrate or keep what it has, fit, search, evaluate, write `quantized.ckpt`."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from qat import kernels
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.ranks import connect, is_first
from qat.launch.run_dir import CONFIG, UsedError
from qat.lit.accuracy import evaluate
from qat.lit.loggers import closing
from qat.lit.quiet import quiet_libraries
from qat.model.convert import conversion_of, convert
from qat.model.cost import cost
from qat.model.frozen import is_frozen
from qat.model.metadata import classes_of
from qat.model.ptq_spec import PtqRecipe
from qat.model.scales import assert_ready
from qat.model.start import Start
from qat.model.storage import save
from qat.ptq import calibrate, in_float
from qat.ptq.compensate import compensate
from qat.ptq.reconstruct import ReconstructSettings, reconstruct, split_batches
from qat.ptq.scale_vectors import scale_vectors
from qat.ptq.search import SearchSettings, logits_of, search
from qat.ptq.state import read_state
from qat.spec import recipe as preset
from qat.tasks import build, fit, summary
from qat.tasks.checks import check_trainer
from qat.tasks.evaluate import build_subject, measure, origin
from qat.tasks.hub import resolve_hub_model
from qat.tasks.predict import EvaluatedNet
from qat.tasks.report import report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.tasks.resume import compare_settings, compared
from qat.tasks.settings import check as check_settings
from qat.tasks.teacher import fit_teacher, net_of_file
from qat.utils.probing import copied
from qat.utils.validate import check_int

log = logging.getLogger(__name__)

FILE, KEEP = "quantized.ckpt", "keep"
STATES = ("search.ckpt", "reconstruct.ckpt")


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
    quiet_libraries()
    resolve_hub_model(cfg)
    build.count_classes(cfg)
    kernels.use("auto")
    check_trainer(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)
    check_int("ptq.batch", cfg.ptq.batch, 1)
    recipe, searching = build_ptq_recipe(cfg), build_search(cfg)
    fitting = build.settings_of(
        ReconstructSettings, "ptq.reconstruct", build.plain(cfg.ptq).get("reconstruct") or {}
    )
    method = "keep" if recipe is None else recipe.method
    _check_run_dir(cfg)
    build.import_modules(cfg)
    subject = build_subject(cfg)
    _check_start(cfg, subject, searches=searching is not None)
    teacher = _target_net(cfg, subject)
    batches = calibration_batches(cfg, subject.data)
    if method == "reconstruct":
        split_batches(torch.cat(batches), fitting.batch)
    trainer = fit.build_trainer(cfg, [], fit.build_loggers(cfg))
    changes_weights = method in {"compensate", "reconstruct"}
    if trainer.world_size > 1 and (changes_weights or searching):
        raise UsageError(
            f"trainer.devices={trainer.world_size}: must be 1 with a search or ptq.method=compensate, reconstruct"
        )
    quantized = subject
    if recipe is not None:
        net = convert(copied(subject.net), recipe, input_size=subject.data.input_size)
        quantized = dataclasses.replace(subject, net=net, recipe=recipe)
    if searching is not None:  # else a calibration would be for nothing
        scale_vectors(quantized.net, searching.targets)
    connect(trainer)
    if is_first():
        record_run(cfg)
        _announce(cfg, quantized, batches, trainer)
    with closing(trainer.loggers):
        followed = (
            subject
            if teacher is None
            else dataclasses.replace(subject, net=teacher, recipe=preset("fp"))
        )
        with in_float(followed.net):
            plain = _measure(trainer, followed, "float")
        figures: dict[str, Any] = {
            f"{key}_fp": plain.get(key) for key in ("top1", "top5", "loss")
        } | {"calibration": None}
        if recipe is None:
            figures["top1_start"] = _measure(trainer, subject, "unchanged quantized")["top1"]
        else:
            figures["calibration"] = _calibrate(quantized, batches, trainer)
            if changes_weights or searching:
                figures["top1_calibrated"] = _measure(trainer, quantized, "calibrated")["top1"]
        since = time.monotonic()
        if changes_weights:
            # What follows has to come close to the float net as it was: the weights of this one change.
            teacher = subject.net.to(trainer.strategy.root_device).eval()
            figures |= _fit_weights(
                cfg,
                quantized.net,
                teacher,
                batches,
                fitting if method == "reconstruct" else None,
                trainer,
            )
        if searching is not None:
            figures["search"] = _search(cfg, searching, quantized, batches, trainer, teacher)
        began -= _seconds_before_resume(figures, since)
        if not cfg.trainer.fast_dev_run and is_first():
            _save(cfg, quantized, subject)
        found = _measure(trainer, quantized, "quantized")
    figures |= {"weights": origin(cfg), "wall_seconds": round(time.monotonic() - began, 1)}
    write_results(cfg, model=subject.name, **recipe_fields(quantized.recipe), **found, **figures)
    _log_scores(cfg, found, figures)
    report_run(cfg, quantized.net, subject.data.input_size)
    return float(found["top1"])


def _log_scores(cfg: DictConfig, measured: dict[str, Any], figures: dict[str, Any]) -> None:
    message = "%s top-1: float %.2f %%, quantized %.2f %%; outputs in %s"
    log.info(message, measured["split"], figures["top1_fp"], measured["top1"], cfg.run_dir)


def _save(cfg: DictConfig, quantized: EvaluatedNet, subject: EvaluatedNet) -> None:
    save(
        quantized.net,
        Path(cfg.run_dir) / FILE,
        model=subject.name,
        data=build.plain(cfg.data),
        classes=classes_of(quantized.net) or subject.data.named_classes(),
    )


def _announce(
    cfg: DictConfig, quantized: EvaluatedNet, batches: list[Tensor], trainer: Trainer
) -> None:
    data = quantized.data
    more = {
        "data": summary.describe_data(data),
        "images": summary.describe_images(data.settings, quantized.assumed),
        "calibration": f"{len(batches)} x {cfg.ptq.batch} training images, seed {data.settings.seed}",
        "weights": origin(cfg),
        "device": summary.describe_device(trainer),
        "outputs": str(cfg.run_dir),
    }
    title = "post-training quantization"
    summary.announce(
        title, quantized.net, quantized.name, quantized.recipe, data.input_size, **more
    )
    log.info(summary.conversion(quantized.net, Path(cfg.run_dir)))


def _measure(trainer: Trainer, subject: EvaluatedNet, what: str) -> dict[str, Any]:
    """Evaluate a net, which is on the trainer's device then: keys of `results.json`."""
    log.info("evaluating the %s model", what)
    found = measure(subject, trainer, cost(subject.net, subject.data.input_size))
    subject.net.to(
        trainer.strategy.root_device
    )  # Lightning takes it to the CPU at the end of a test
    return found


def _calibrate(quantized: EvaluatedNet, batches: list[Tensor], trainer: Trainer) -> dict[str, Any]:
    """Fill the scales; gives what `results.json` says of it."""
    since = time.monotonic()
    done = calibrate(quantized.net.to(trainer.strategy.root_device), batches)
    seconds = round(time.monotonic() - since, 2)
    log.info("calibrated %d scales on %d images in %.1f s", done.scales, done.images, seconds)
    return dataclasses.asdict(done) | {"seconds": seconds, "seed": quantized.data.settings.seed}


def _fit_weights(
    cfg: DictConfig,
    net: nn.Module,
    teacher: nn.Module,
    batches: list[Tensor],
    fitting: ReconstructSettings | None,
    trainer: Trainer,
) -> dict[str, Any]:
    """Compensate, and reconstruct where there are settings for it; gives what `results.json` says of it."""
    since = time.monotonic()
    layers = compensate(net, teacher, batches)
    if fitting is None:
        return {"compensation": {"layers": layers, "seconds": round(time.monotonic() - since, 1)}}
    context, resume = trainer.precision_plugin.forward_context, bool(cfg.resume)
    return {
        "reconstruction": reconstruct(
            net,
            teacher,
            torch.cat(batches),
            fitting,
            context=context,
            run_dir=cfg.run_dir,
            resume=resume,
            run=compared(cfg),
        )
    }


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

    found = search(
        net,
        batches,
        targets,
        settings,
        run_dir=cfg.run_dir,
        resume=bool(cfg.resume),
        run=compared(cfg),
        validate=accuracy,
    )
    log.info(
        "search: fitness %.6g to %.6g in %.1f s", found.fitness_before, found.fitness, found.seconds
    )
    return dataclasses.asdict(found)


def _seconds_before_resume(figures: dict[str, Any], since: float) -> float:
    """What reconstruction and search count beside the time after `since`, in which this process did its part of them."""
    counted = sum(figures[key]["seconds"] for key in ("reconstruction", "search") if key in figures)
    return max(0.0, counted - (time.monotonic() - since))


def build_ptq_recipe(cfg: DictConfig) -> PtqRecipe | None:
    """The recipe of `cfg.ptq`; None under `ptq=keep`, where a net that is quantized already keeps its quantizers.

    Raises:
        UsageError: it has a key that is no knob, or a value that cannot work.
    """
    knobs = {
        key: value
        for key, value in build.plain(cfg.ptq).items()
        if key not in {"batch", "reconstruct"}
    }
    if cfg.ptq.get("name") != KEEP:
        return build.settings_of(PtqRecipe, "ptq", knobs)
    for key in knobs.keys() - {"name"}:
        raise UsageError(f"ptq.{key}: ptq=keep leaves the model unchanged and takes only ptq.batch")
    return None


def build_search(cfg: DictConfig) -> SearchSettings | None:
    """The settings of `cfg.search`, None where there is no search.

    Raises:
        UsageError: it has a key that is no setting, or a value that cannot work.
    """
    settings = build.plain(cfg.search)
    return build.settings_of(SearchSettings, "search", settings) if settings else None


def _check_run_dir(cfg: DictConfig) -> None:
    """Raise `UsageError` if `resume` has nothing to go on from, or the directory is another run's."""
    run_dir = Path(cfg.run_dir)
    if cfg.resume is True and _state_file(run_dir) is None:
        raise UsageError(
            f"resume=true: run_dir={str(run_dir)!r} has no {' and no '.join(STATES)}; use resume=auto to start a new run in that case"
        )
    if cfg.overwrite:
        return
    if cfg.resume:
        outputs.check_own(run_dir, cfg.command, origin(cfg))
    elif used := outputs.used_files(run_dir):
        held = next(
            (path for path in reversed(used) if path.suffix == ".ckpt"), used[0]
        ).relative_to(run_dir)
        raise UsedError(
            f"run_dir={str(run_dir)!r} holds {held} already; choose another run_dir or set overwrite=true"
        )


def _state_file(run_dir: Path) -> Path | None:
    """The state that was written last; None where there is none."""
    state_files = [path for name in STATES if (path := run_dir / name).is_file()]
    return max(state_files, key=lambda path: path.stat().st_mtime_ns, default=None)


def _settings_to_resume(state_file: Path) -> dict[str, Any]:
    """Settings of the run that wrote a state; those of older versions are only in `config.yaml`.

    Raises:
        UsageError: they cannot be read.
    """
    run = read_state(state_file)["run"]
    if isinstance(run, dict):
        return run
    path = state_file.with_name(CONFIG)
    try:
        return dict(build.plain(OmegaConf.load(path)))
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(
            f"resume: {path} cannot be read; resume=false overwrite=true starts over"
        ) from error


def _check_start(cfg: DictConfig, subject: EvaluatedNet, *, searches: bool) -> None:
    """Is `ckpt` what the recipe starts from: a quantized net under `ptq=keep`, else a float one? What has changed since a run began?

    Raises:
        UsageError: it is not, or there is nothing to be done, or nothing to compare with; or the run to resume had another method.
    """
    state_file = _state_file(Path(cfg.run_dir))
    if cfg.resume and state_file is not None:
        kept = (
            "a resumed run keeps its method; use resume=false in another run_dir to start a new run"
        )
        compare_settings(_settings_to_resume(state_file), cfg, ("ptq.",), kept)
    held = (
        None
        if conversion_of(subject.net) is None
        else summary.describe_recipe(subject.recipe).partition(":")[0]
    )
    file = f"ckpt={str(cfg.ckpt)!r}"
    if cfg.ptq.get("name") != KEEP:
        if held is not None:
            refused = f"{file}: is quantized already ({held}); must be a float model"
            raise UsageError(f"{refused}; ptq=keep search=evolution takes a quantized one")
        if cfg.teacher.ckpt is not None:
            raise UsageError(
                f"teacher.ckpt={cfg.teacher.ckpt!r}: only with ptq=keep; otherwise the targets are the logits of the float model itself"
            )
        return
    if is_frozen(subject.net):
        raise UsageError(
            f"{file}: holds only integer codes; must be the checkpoint that it was exported from"
        )
    if held is None:
        raise UsageError(
            "ptq=keep: the model is in float; must be a recipe of conf/ptq, e.g. ptq=fqvit_w4a8"
        )
    if not searches:
        raise UsageError(
            "ptq=keep: there is nothing to do; add a search over the scales, e.g. search=evolution"
        )
    if cfg.teacher.ckpt is None and getattr(subject.recipe, "method", None) != "calibrate":
        how = "fitted" if isinstance(subject.recipe, PtqRecipe) else "trained"
        raise UsageError(
            f"{file}: was {how} quantized ({held}), so it has no float logits to follow; set teacher.ckpt=FILE"
        )
    assert_ready(subject.net)


def _target_net(cfg: DictConfig, subject: EvaluatedNet) -> nn.Module | None:
    """The float net of `teacher.ckpt`; None where the net's own weights give the targets.

    Raises:
        UsageError: the file cannot be read, is of a quantized net, or of one for other classes or images.
    """
    path = cfg.teacher.ckpt
    if path is None:
        return None
    net = net_of_file(path, subject.name, cast(dict, subject.net._model_args))
    if conversion_of(net) is not None:
        raise UsageError(
            f"teacher.ckpt={path!r}: is quantized; must be a float model, whose logits are the targets of the search"
        )
    fit_teacher(Start(net), cfg, subject.data, "teacher.ckpt")
    return net.eval()


def calibration_batches(cfg: DictConfig, data: ImageData) -> list[Tensor]:
    """Training images in whole batches of `ptq.batch`; a rest that fills none is left out.

    Raises:
        UsageError: there are too few images for one batch.
    """
    wanted, size = data.settings.calibration_images, cfg.ptq.batch
    if wanted < size:
        raise UsageError(
            f"data.calibration_images={wanted}: less than one batch; must be an integer of at least ptq.batch={size}"
        )
    batches = [batch for batch in data.calibration_batches(size) if len(batch) == size]
    if not batches:
        count = len(data.split("train"))
        raise UsageError(
            f"ptq.batch={size}: the data have {count} training images, which fill no batch of this size; must be at most {count}"
        )
    return batches
