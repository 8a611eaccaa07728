"""`analyze.py`: what one net or several are like: tables, figures, a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from qat import kernels
from qat.analysis import NO_IMAGES, Analysis, ImageSet, StudiedNet, write_outcome
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.lit.quiet import quiet_libraries
from qat.tasks import build, fit, summary
from qat.tasks.checks import check_trainer
from qat.tasks.conf import options
from qat.tasks.evaluate import build_subject, origin
from qat.tasks.hub import resolve_hub_model
from qat.tasks.predict import EvaluatedNet
from qat.tasks.report import remake, report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.tasks.settings import check as check_settings

log = logging.getLogger(__name__)


def analyze(cfg: DictConfig) -> None:
    """Analyse one net or several, or make the report of a run anew (`run=DIR`).

    Args:
        cfg: composed from `conf/analyze.yaml`; `cfg.run_dir` is the job's directory.

    Raises:
        UsageError: a setting, path or file cannot work.
    """
    check_settings(cfg)
    quiet_libraries()
    resolve_hub_model(cfg)
    build.count_classes(cfg)
    kernels.use("auto")
    check_trainer(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.run is not None:
        remake(cfg)
        return
    began = time.monotonic()
    run_dir = Path(cfg.run_dir)
    outputs.check_own(run_dir, cfg.command)
    analysis = build_analysis(cfg)
    build.import_modules(cfg)

    paths = list(cfg.ckpt) if OmegaConf.is_list(cfg.ckpt) else [cfg.ckpt]
    jobs: list[Any] = [OmegaConf.merge(cfg, {"ckpt": path}) for path in paths]
    subjects = [build_subject(job) for job in jobs]
    origins = [origin(job) for job in jobs]
    _check_alike(subjects, origins)
    cfg.data = jobs[0].data  # the config that was settled: it is what is recorded
    trainer = fit.build_trainer(cfg, [], [])
    if trainer.world_size > 1:
        raise UsageError(
            f"trainer.devices={cfg.trainer.devices!r}: analyses run on one device; must be 1"
        )
    if trainer.precision != "32-true":
        raise UsageError(
            f"trainer.precision={cfg.trainer.precision!r}: analyses run in float32; must be 32-true"
        )
    device = trainer.strategy.root_device
    nets = [
        StudiedNet(
            label,
            subject.net.eval().to(device),
            subject.data.input_size,
            None if path is None else Path(path),
        )
        for label, subject, path in zip(
            make_labels(cfg.labels, origins), subjects, paths, strict=True
        )
    ]

    data, images = subjects[0].data, NO_IMAGES
    entries = {"analysis": analysis.name}
    for subject, net in zip(subjects, nets, strict=True):
        model = summary.describe_model(subject.name, subject.net, subject.data.input_size)
        entries[net.label] = f"{model}; {summary.describe_recipe(subject.recipe)}"
    if analysis.split is not None:
        split = cfg.split or (data.evaluation_split if analysis.split == "test" else analysis.split)
        images = ImageSet(
            [(x.to(device), target.to(device)) for x, target in data.sample(split, cfg.images)],
            split,
        )
        entries["images"] = f"{images.n_images} of the {split} split; {summary.describe_data(data)}"
    log.info(summary.lines("qat: analysis", entries | {"outputs": str(run_dir)}))

    outcome = analysis.run(nets, images)
    record_run(
        cfg
    )  # nothing refuses from here on: the files of an older run are as they were until now
    write_outcome(run_dir, analysis.name, build.plain(cfg.analysis), outcome)
    weights = [str(path) for path in paths if path is not None]
    write_results(
        cfg,
        model=subjects[0].name,
        **recipe_fields(subjects[0].recipe),
        weights=weights[0] if len(weights) == 1 else weights or None,
        split=images.split or None,
        analysis=analysis.name,
        summary=outcome.summary,
        wall_seconds=round(time.monotonic() - began, 1),
    )
    log.info("%s: figures and tables in %s", analysis.name, run_dir)
    report_run(cfg)


def build_analysis(cfg: DictConfig) -> Analysis:
    """The analysis of `cfg.analysis`.

    Raises:
        UsageError: there is none, or it has a setting that cannot work.
    """
    if cfg.analysis is None:
        choices = ", ".join(options("analysis"))
        raise UsageError(
            f"analysis is not set: must be one of {choices}; or set run=DIR to rebuild a report, or sweep=DIR to gather results"
        )
    analysis = build.instantiate(cfg.analysis, "analysis")
    if not isinstance(analysis, Analysis):
        raise UsageError(
            f"analysis._target_={cfg.analysis._target_!r}: must be a subclass of qat.analysis.Analysis"
        )
    return analysis


def _check_alike(subjects: Sequence[EvaluatedNet], paths: Sequence[str]) -> None:
    """Nets that are compared see the same images."""
    names = ("in_chans", "image_size", "num_classes", "mean", "std")
    first, *others = [
        {"class": type(one.data).__name__}
        | {name: getattr(one.data.settings, name) for name in names}
        for one in subjects
    ]
    for path, other in zip(paths[1:], others, strict=True):
        for name in [name for name in first if first[name] != other[name]]:
            ours = f"those of {paths[0]!r} {first[name]}"
            raise UsageError(
                f"ckpt={path!r}: its data have {name} {other[name]}, {ours}; set data=... for both"
            )


def make_labels(given: Sequence[str] | None, paths: Sequence[str]) -> list[str]:
    """Names of checkpoints in plots: those given, else the shortest ends of the paths that differ.

    Raises:
        UsageError: they are not as many as the paths, or not all different.
    """
    if given is not None:
        labels = list(given)
        if len(labels) != len(paths) or len(set(labels)) < len(labels):
            raise UsageError(
                f"labels={labels}: must be as many as there are checkpoints ({len(paths)}), all different"
            )
        return labels
    parts = [
        [part for part in Path(path).with_suffix("").parts if part != "checkpoints"]
        for path in paths
    ]
    for start in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-start:]) for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UsageError(f"ckpt={list(paths)}: their names do not differ; set labels")
