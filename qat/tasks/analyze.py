"""`analyze.py`: tables, figures and a report on one or more models."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qat.analysis import NO_IMAGES, Analysis, ImageSet, StudiedNet, write_outcome
from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.tasks import build, fit, summary
from qat.tasks.conf import options
from qat.tasks.report import rebuild_report, report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.tasks.set_up import set_up
from qat.tasks.subject import EvaluatedNet, build_evaluated_net, origin

log = logging.getLogger(__name__)
# Settings in which the data of all models must agree, besides class and folder.
_IMAGE_FACTS = (
    "in_chans",
    "image_size",
    "num_classes",
    "mean",
    "std",
    "crop_pct",
    "crop_mode",
    "interpolation",
    "name",
)


def analyze(cfg: DictConfig) -> None:
    """Analyse one or more models, or rebuild the report of a run (`run=DIR`).

    Args:
        cfg: config composed from `conf/analyze.yaml`; `cfg.run_dir` is the job's directory.

    Raises:
        UsageError: a setting, path or file cannot be used.
    """
    set_up(cfg)
    if cfg.run is not None:
        rebuild_report(cfg)
        return
    start_time = time.monotonic()
    run_dir = Path(cfg.run_dir)
    outputs.check_own(run_dir, cfg.command)
    analysis = build_analysis(cfg.analysis)
    build.import_modules(cfg.model.imports)

    paths = list(cfg.ckpt) if OmegaConf.is_list(cfg.ckpt) else [cfg.ckpt]
    jobs: list[Any] = [OmegaConf.merge(cfg, {"ckpt": path}) for path in paths]
    tests_only = analysis.split == "test"
    subjects = [build_evaluated_net(job, tests_only=tests_only) for job in jobs]
    origins = [origin(job) for job in jobs]
    if analysis.split is not None:
        _check_same_images(subjects, origins)
    cfg.data = jobs[0].data  # set by `build_evaluated_net`, and recorded below
    device = _single_device(cfg)
    labels = make_labels(cfg.labels, origins)
    nets = []
    for label, subject, path in zip(labels, subjects, paths, strict=True):
        file = None if path is None else Path(path)
        net = subject.net.eval().to(device)
        nets.append(StudiedNet(label, net, subject.data.input_size, file))

    images = NO_IMAGES
    entries = {"analysis": analysis.name}
    for subject, studied_net in zip(subjects, nets, strict=True):
        model = summary.describe_model(subject.name, subject.net, subject.data.input_size)
        entries[studied_net.label] = f"{model}; {summary.describe_recipe(subject.recipe)}"
    # `evaluates_whole` is False for a model that was trained on some of these images. Then test
    # all models on the images that are held out for that model (False < True).
    data = min((subject.data for subject in subjects), key=lambda data: data.evaluates_whole)
    if analysis.split is not None:
        default = data.evaluation_split if analysis.split == "test" else analysis.split
        images = _load_images(data, cfg.split or default, cfg.images, device)
        data_text = summary.describe_data(data)
        entries["images"] = f"{images.num_images} of the {images.split} split; {data_text}"
    entries["outputs"] = str(run_dir)
    log.info(summary.aligned_lines("qat: analysis", entries))

    outcome = analysis.run(nets, images)
    # The analysis has succeeded, so files of an older run may be replaced.
    record_run(cfg)
    write_outcome(run_dir, analysis.name, build.to_plain(cfg.analysis), outcome)
    weights: Any = [str(path) for path in paths if path is not None]
    if len(weights) < 2:
        weights = weights[0] if weights else None
    write_results(
        cfg,
        model=subjects[0].name,
        **recipe_fields(subjects[0].recipe),
        weights=weights,
        split=images.split or None,
        analysis=analysis.name,
        summary=outcome.summary,
        wall_seconds=round(time.monotonic() - start_time, 1),
    )
    log.info("%s: figures and tables in %s", analysis.name, run_dir)
    report_run(cfg)


def _single_device(cfg: DictConfig) -> torch.device:
    """The device of an analysis; raise `UsageError` unless it is one device with float32."""
    trainer = fit.build_trainer(cfg, [], [])
    if trainer.world_size > 1:
        name = "num_nodes" if trainer.num_devices == 1 else "devices"
        raise UsageError(
            f"trainer.{name}={cfg.trainer[name]!r}: analyses run on one device; must be 1"
        )
    if trainer.precision != "32-true":
        raise UsageError(
            f"trainer.precision={cfg.trainer.precision!r}: analyses run in float32; must be 32-true"
        )
    return trainer.strategy.root_device


def _load_images(
    data: ImageData, split: str, num_images: int | None, device: torch.device
) -> ImageSet:
    sample = data.sample(split, num_images)
    return ImageSet([(images.to(device), labels.to(device)) for images, labels in sample], split)


def build_analysis(settings: DictConfig | None) -> Analysis:
    """Build the analysis of `analysis.*`.

    Raises:
        UsageError: the analysis is not set, is not an `Analysis`, or has an invalid setting.
    """
    if settings is None:
        choices = ", ".join(options("analysis"))
        raise UsageError(
            f"analysis is not set: must be one of {choices}; "
            "or set run=DIR to rebuild a report, or sweep=DIR to gather results"
        )
    analysis = build.instantiate(settings, "analysis")
    if not isinstance(analysis, Analysis):
        raise UsageError(
            f"analysis._target_={settings._target_!r}: must be a subclass of qat.analysis.Analysis"
        )
    return analysis


def _check_same_images(subjects: Sequence[EvaluatedNet], origins: Sequence[str]) -> None:
    """Check that the data of all models agree in `_image_facts`."""
    first_facts = _image_facts(subjects[0].data)
    for subject, path in zip(subjects[1:], origins[1:], strict=True):
        for name, value in _image_facts(subject.data).items():
            if value != first_facts[name]:
                setting = "data=..." if name == "class" else f"data=... and data.{name}=..."
                raise UsageError(
                    f"ckpt={path!r}: the data have {name} {value}, "
                    f"but the data of {origins[0]!r} have {first_facts[name]}; "
                    f"set {setting} for both"
                )


def _image_facts(data: ImageData) -> dict[str, Any]:
    facts: dict[str, Any] = {"class": type(data).__name__}
    for name in _IMAGE_FACTS:
        value = getattr(data.settings, name, None)  # only data=timm has a name
        facts[name] = list(value) if isinstance(value, tuple) else value
    root = data.settings.root
    facts["root"] = None if root is None else os.path.realpath(root)
    return facts


def make_labels(own_labels: Sequence[str] | None, paths: Sequence[str]) -> list[str]:
    """Names of checkpoints in plots: the user's labels, or the shortest path endings that differ.

    Raises:
        UsageError: the number of labels differs from the number of paths, or labels are not unique.
    """
    if own_labels is not None:
        labels = list(own_labels)
        if len(labels) != len(paths) or len(set(labels)) < len(labels):
            raise UsageError(
                f"labels={labels}: must be {len(paths)} different names, one for each checkpoint"
            )
        return labels
    all_parts = []
    for path in paths:
        *folders, name = Path(path).with_suffix("").parts
        all_parts.append([*(folder for folder in folders if folder != "checkpoints"), name])
    max_parts = max(len(parts) for parts in all_parts)
    for num_parts in range(1, max_parts + 1):
        labels = ["/".join(parts[-num_parts:]) for parts in all_parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UsageError(f"ckpt={list(paths)}: the paths give equal labels; set labels")
