"""`export.py`: a file to deploy, written beside its name, compared with the checkpoint, and given its name only if it agrees."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from qat.data import DataSettings
from qat.data.image_transform import data_settings
from qat.errors import UsageError
from qat.export.artefact import Written, kept, packed_artefact
from qat.export.graph import TARGETS, OnnxSettings, check_size, require_onnx
from qat.export.onnx_file import IMAGES, preprocessing
from qat.export.stored_weights import TWO_BIT
from qat.launch import run_dir as outputs
from qat.model.checkpoint import build_from, describe, read_checkpoint
from qat.model.convert import Conversion, conversion_of
from qat.model.frozen import freeze, is_frozen
from qat.model.transform import data_config
from qat.spec import QuantRecipe
from qat.tasks import build, summary
from qat.tasks.checks import check_settings
from qat.tasks.evaluate import build_subject, origin
from qat.tasks.report import report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.utils.validate import check_choice, check_int

log = logging.getLogger(__name__)

NAMES = {"onnx": "net.onnx", "packed": "net.safetensors"}


def export(cfg: DictConfig) -> float:
    """Write one checkpoint to a deployable file.

    Args:
        cfg: composed from `conf/export.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Images in percent on which the file names the class that the net names.

    Raises:
        UsageError: a setting, path or file cannot work, or what was written disagrees; it is then kept as `<file>.rejected`.
    """
    began = time.monotonic()
    _check(cfg)
    build.import_modules(cfg)
    target = _target(cfg)
    outputs.check_own(Path(cfg.run_dir), cfg.command)
    source = _source(cfg)
    frozen = source.net if is_frozen(source.net) else freeze(source.net)
    if cfg.dynamic_size:
        check_size(frozen)
    log.info(summary.lines("qat: export", _entries(cfg, source, target)))
    record_run(cfg)
    written = kept(target, _artefact(cfg, source, frozen))
    top1 = min(found.top1 for found in written.checked.agreement.values())
    log.info("%s\n%s\n%s bytes", written.text, target, f"{target.stat().st_size:,}")
    write_results(
        cfg,
        model=source.name,
        **recipe_fields(source.recipe),
        weights=origin(cfg),
        size_bytes=target.stat().st_size,
        file=str(target),
        agreement=top1,
        **written.results,
        wall_seconds=round(time.monotonic() - began, 1),
    )
    report_run(cfg, None if is_frozen(source.net) else source.net, _conversion(cfg, source.net).input_size)
    return top1


def _check(cfg: DictConfig) -> None:
    check_settings(cfg)
    check_int("latency", cfg.latency, 0)
    check_int("threads", cfg.threads, 1)
    if not cfg.ckpt:
        raise UsageError("ckpt is not set; export.py writes a checkpoint of train.py or ptq.py: ckpt=PATH")
    _check_packed(cfg) if cfg.format.name == "packed" else _check_onnx(cfg)


def _check_packed(cfg: DictConfig) -> None:
    for key, value in (("dynamic_batch", True), ("dynamic_size", False)):
        if cfg[key] != value:
            raise UsageError(f"{key}={cfg[key]!r}: only for format=onnx")


def _check_onnx(cfg: DictConfig) -> None:
    require_onnx()
    check_choice("format.two_bit", cfg.format.two_bit, tuple(TWO_BIT))
    check_choice("format.target", cfg.format.target, TARGETS)


def _target(cfg: DictConfig) -> Path:
    target = Path(cfg.file) if cfg.file else Path(cfg.run_dir) / NAMES[cfg.format.name]
    suffix = Path(NAMES[cfg.format.name]).suffix
    if target.suffix != suffix:
        raise UsageError(f"file={str(target)!r}: must end in {suffix} with format={cfg.format.name}")
    if target.is_dir():
        raise UsageError(f"file={str(target)!r}: a folder, not a file")
    if target.exists() and not cfg.overwrite:
        raise UsageError(f"{target} is there already; overwrite=true replaces it, file=... or run_dir=... writes elsewhere")
    return target


@dataclass(frozen=True)
class _Source:
    """What is exported.

    Attributes:
        name: the net's, by timm.
        recipe: how it is quantized.
        settings: how its images are prepared.
        images: on which net and file are run.
        shown: what these are.
        data: config of its data, None where its file knows none.
        classes: their names, None where nobody knows them.
    """

    net: nn.Module
    name: str
    recipe: QuantRecipe
    settings: DataSettings
    images: list[Tensor]
    shown: str
    data: dict[str, Any] | None
    classes: list[str] | None


def _source(cfg: DictConfig) -> _Source:
    """A net with its data, or with noise: of a net that was made in Python nobody may know what it is for."""
    checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format)
    meta = checkpoint.meta
    if meta is None or "_target_" in (meta.get("data") or {}) or "_target_" in build.plain(cfg.data):
        subject = build_subject(cfg)
        _conversion(cfg, subject.net)
        split = cfg.split or subject.data.evaluation_split
        images = [images for images, _ in subject.data.sample(split, cfg.images)]
        shown = f"{sum(map(len, images))} images of {type(subject.data).__name__.lower()}"
        data = build.plain(cfg.data) if "_target_" in cfg.data else dict(data_config(subject.net))
        return _Source(subject.net, subject.name, subject.recipe, subject.data.settings, images, shown, data, subject.classes)
    net = build_from(checkpoint)
    done = _conversion(cfg, net)
    noise = torch.randn(IMAGES, *done.input_size).split(8)
    settings = data_settings(data_config(net))
    shown = f"{IMAGES} images of noise; data=... has others"
    return _Source(net, meta["model"]["name"], done.recipe, settings, list(noise), shown, None, None)


def _conversion(cfg: DictConfig, net: nn.Module) -> Conversion:
    done = conversion_of(net)
    if done is None:
        raise UsageError(f"ckpt={origin(cfg)!r}: holds a float net; export.py writes quantized ones, of train.py and ptq.py")
    return done


def _entries(cfg: DictConfig, source: _Source, target: Path) -> dict[str, str]:
    input_size = _conversion(cfg, source.net).input_size
    return {
        "model": summary.describe_model(source.name, source.net, input_size),
        "recipe": summary.describe_recipe(source.recipe),
        "weights": origin(cfg),
        "checked on": source.shown,
        "file": str(target),
    }


def _artefact(cfg: DictConfig, source: _Source, frozen: nn.Module) -> Callable[[Path], Written]:
    meta = describe(frozen, data=source.data, classes=source.classes)
    if cfg.format.name == "packed":
        return lambda path: packed_artefact(path, frozen, source.net, meta, source.images)
    from qat.export.artefact_onnx import onnx_artefact

    settings = OnnxSettings(
        dynamic_batch=cfg.get("dynamic_batch", True),
        dynamic_size=cfg.dynamic_size,
        target=cfg.format.target,
        two_bit=cfg.format.two_bit,
        latency=cfg.latency,
        threads=cfg.threads,
    )
    meta["preprocessing"] = preprocessing(source.settings)
    return lambda path: onnx_artefact(path, frozen, source.net, meta, source.images, settings)
