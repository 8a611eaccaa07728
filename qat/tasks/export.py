"""`export.py`: a file to deploy, written beside its name, compared with the checkpoint, and given its name only if it agrees."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from torch import Tensor, nn

from qat.cli.repeat import recorded
from qat.cli.results import recipe_fields, write_results
from qat.errors import UsageError
from qat.export.artefact import Written, packed_artefact
from qat.export.graph import check_size, require_onnx
from qat.export.stored_weights import TWO_BIT
from qat.model.checkpoint import describe
from qat.model.convert import conversion_of
from qat.model.frozen import freeze, is_frozen
from qat.model.transform import data_config
from qat.tasks import build, summary
from qat.tasks.checks import check_settings
from qat.tasks.evaluate import build_subject, origin
from qat.tasks.predict import EvaluatedNet, class_names
from qat.utils.files import write_text
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
    seed_everything(cfg.seed, workers=True, verbose=False)
    build.import_modules(cfg)
    target = _target(cfg)
    subject = build_subject(cfg)
    if conversion_of(subject.net) is None:
        raise UsageError(f"ckpt={origin(cfg)!r}: holds a float net; export.py writes quantized ones, of train.py and ptq.py")
    frozen = subject.net if is_frozen(subject.net) else freeze(subject.net)
    if cfg.dynamic_size:
        check_size(frozen)
    images = _images(cfg, subject)
    log.info(summary.lines("qat: export", _entries(cfg, subject, target, images)))
    write_text(Path(cfg.run_dir) / "config.yaml", recorded(cfg))
    written, top1 = _write(cfg, target, subject, frozen, images)
    log.info("%s\n%s\n%s bytes", written.text, target, f"{target.stat().st_size:,}")
    write_results(
        cfg,
        model=subject.name,
        **recipe_fields(subject.recipe),
        weights=origin(cfg),
        size_bytes=target.stat().st_size,
        file=str(target),
        agreement=top1,
        **written.results,
        wall_seconds=round(time.monotonic() - began, 1),
    )
    return top1


def _check(cfg: DictConfig) -> None:
    check_settings(cfg)
    check_int("latency", cfg.latency, 0)
    check_int("threads", cfg.threads, 1)
    if not cfg.ckpt:
        raise UsageError("ckpt is not set; export.py writes a checkpoint of train.py or ptq.py: ckpt=PATH")
    _check_packed(cfg) if cfg.format.name == "packed" else _check_onnx(cfg)


def _check_packed(cfg: DictConfig) -> None:
    for key, value in (("opset", None), ("dynamic_batch", True), ("dynamic_size", False)):
        if cfg[key] != value:
            raise UsageError(f"{key}={cfg[key]!r}: only for format=onnx")


def _check_onnx(cfg: DictConfig) -> None:
    require_onnx()
    check_choice("format.two_bit", cfg.format.two_bit, TWO_BIT)


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


def _images(cfg: DictConfig, subject: EvaluatedNet) -> list[Tensor]:
    split = cfg.split or subject.data.evaluation_split
    return [images for images, _ in subject.data.sample(split, cfg.images)]


def _entries(cfg: DictConfig, subject: EvaluatedNet, target: Path, images: Sequence[Tensor]) -> dict[str, str]:
    return {
        "model": summary.describe_model(subject.name, subject.net, subject.data),
        "recipe": summary.describe_recipe(subject.recipe),
        "weights": origin(cfg),
        "checked on": f"{sum(map(len, images))} images of {type(subject.data).__name__.lower()}",
        "file": str(target),
    }


def _write(cfg: DictConfig, target: Path, subject: EvaluatedNet, frozen: nn.Module, images: Sequence[Tensor]) -> tuple[Written, float]:
    """Write, compare, and only then give the file its name."""
    unchecked = target.with_name(f".unchecked.{target.name}")
    unchecked.parent.mkdir(parents=True, exist_ok=True)
    try:
        written = _artefact(cfg, subject, frozen, images)(unchecked)
        problem = written.checked.problem
        rejected = target.with_name(f"{target.name}.rejected")
        if problem is not None:
            unchecked.replace(rejected)
            raise UsageError(f"file={str(target)!r}: what was written does not agree with the checkpoint ({problem}); kept as {rejected}")
        rejected.unlink(missing_ok=True)
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)
    return written, min(found.top1 for found in written.checked.agreement.values())


def _artefact(cfg: DictConfig, subject: EvaluatedNet, frozen: nn.Module, images: Sequence[Tensor]) -> Callable[[Path], Written]:
    data = build.plain(cfg.data) if "_target_" in cfg.data else dict(data_config(subject.net))
    classes = class_names(None, subject.data, subject.data.settings.num_classes)
    meta = describe(frozen, data=data, classes=classes)
    if cfg.format.name == "packed":
        return lambda path: packed_artefact(path, frozen, subject.net, meta, images)
    from qat.export.artefact_onnx import OnnxSettings, onnx_artefact

    settings = OnnxSettings(
        opset=cfg.opset,
        dynamic_batch=cfg.get("dynamic_batch", True),
        dynamic_size=cfg.dynamic_size,
        two_bit=cfg.format.two_bit,
        latency=cfg.latency,
        threads=cfg.threads,
    )
    shown = subject.data.settings
    preprocessing = {
        "size": shown.image_size,
        "mean": list(shown.mean),
        "std": list(shown.std),
        "interpolation": shown.interpolation or "bicubic",
        "crop_pct": shown.crop_pct,
    }
    return lambda path: onnx_artefact(path, frozen, subject.net, {**meta, "preprocessing": preprocessing}, images, settings)
