"""`export.py`: a file to deploy, written beside its name, compared with the checkpoint, and given its name only if it agrees."""

from __future__ import annotations

import glob
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from torch import nn

from qat import kernels
from qat.data import DataSettings
from qat.data.image_transform import data_settings
from qat.errors import UsageError
from qat.export.check import Checked, compare, net_codes
from qat.export.onnx_file import (
    IMAGES,
    OnnxSettings,
    export_float,
    preprocessing,
    require_installed,
    write_checked,
    write_onnx,
)
from qat.export.pte import to_pte, write_pte
from qat.export.runtimes import EXECUTORCH, milliseconds, open_session, quantize_8bit
from qat.launch import run_dir as outputs
from qat.lit.quiet import quiet_libraries
from qat.model.checkpoint import read_checkpoint
from qat.model.convert import conversion_of
from qat.model.freeze import freeze
from qat.model.frozen import is_frozen
from qat.model.metadata import describe
from qat.model.packed import write_packed
from qat.model.storage import build_from, float_twin, load
from qat.model.transform import data_config
from qat.tasks import build, summary
from qat.tasks.evaluate import build_subject, origin
from qat.tasks.hub import resolve_hub_model
from qat.tasks.report import report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.tasks.settings import check as check_settings
from qat.utils.files import check_not_folder, remove_unfinished
from qat.utils.text import count
from qat.utils.validate import check_choice, check_int

log = logging.getLogger(__name__)

NAMES = {"onnx": "net.onnx", "packed": "net.safetensors", "executorch": "net.pte"}
_SHOWN = {
    "latency_ms": "ms per image",
    "float_products": "products in float",
    "outside_xnnpack": "outside XNNPACK",
    "logits_apart": "difference / largest logit",
}


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
    check_settings(cfg)
    quiet_libraries()
    resolve_hub_model(cfg)
    build.count_classes(cfg)
    kernels.use("auto")
    seed_everything(cfg.seed, workers=True, verbose=False)
    check_int("latency", cfg.latency, 0)
    check_choice("format.name", cfg.format.name, tuple(NAMES))
    if not cfg.ckpt:
        raise UsageError("ckpt is not set: must be a checkpoint of train.py or ptq.py")
    form = cfg.format.name
    if form != "packed":
        require_installed(form)
    settings = _onnx_settings(cfg)
    build.import_modules(cfg)
    target = _target(cfg)
    net, name, prepared, images, data, classes, shown = _net_and_images(cfg)
    done = conversion_of(net)
    if done is None:
        raise UsageError(
            f"ckpt={origin(cfg)!r}: holds a float model; must be a quantized one, of train.py or ptq.py"
        )
    images = images or list(torch.randn(IMAGES, *done.input_size).split(8))
    frozen = net if is_frozen(net) else freeze(net)
    about = describe(frozen, data=data, classes=classes) | (
        {"preprocessing": preprocessing(prepared)} if form == "onnx" else {}
    )
    more = {"weights": origin(cfg), "checked on": shown, "file": str(target)}
    summary.announce("export", net, name, done.recipe, done.input_size, **more)
    record_run(cfg)
    # A file elsewhere, too, may have been written by a run that was killed.
    unfinished = [f"{prefix}{glob.escape(target.name)}" for prefix in ("", ".unchecked.")]
    remove_unfinished(target.parent, unfinished)

    results: dict[str, Any] = {}

    def write(path: Path) -> Checked:
        if form == "onnx":
            return write_onnx(path, frozen, net, about, images, settings)
        if form == "executorch":
            checked, stays = write_pte(path, frozen, net, images)
            results.update(stays)
            return checked
        results["bytes"] = write_packed(frozen, path, about)
        again = load(path)
        return Checked({"qat.load": compare(net, again, lambda: partial(net_codes, again), images)})

    checked = write_checked(target, write)
    if form != "packed":
        results |= _beside_float(target, float_twin(frozen), images[0][:1], checked, cfg.latency)
    size = target.stat().st_size
    _log_results(checked, results, {"file": f"{target}, {size:,} bytes"})
    write_results(
        cfg,
        model=name,
        **recipe_fields(done.recipe),
        weights=origin(cfg),
        size_bytes=size,
        file=str(target),
        agreement=checked.top1,
        **results,
        wall_seconds=round(time.monotonic() - began, 1),
    )
    report_run(cfg, None if is_frozen(net) else net, done.input_size)
    return checked.top1


def _onnx_settings(cfg: DictConfig) -> OnnxSettings:
    if cfg.format.name != "onnx":
        return OnnxSettings()
    return OnnxSettings(cfg.dynamic_batch, cfg.format.target, cfg.format.two_bit, cfg.format.cpu)


def _log_results(checked: Checked, results: dict[str, Any], written: dict[str, str]) -> None:
    written |= {
        _SHOWN.get(key, key): _words(value)
        for key, value in results.items()
        if key != "time_of_float"
    }
    log.info("%s\n%s", checked.to_text(), summary.lines("written", written))
    for runtime, share in (results.get("time_of_float") or {}).items():
        log.info("runs at %.2f of float's time in %s (this machine, 1 thread)", share, runtime)


def _net_and_images(
    cfg: DictConfig,
) -> tuple[
    nn.Module, str, DataSettings, list[torch.Tensor], dict[str, Any] | None, list[str] | None, str
]:
    """The net and its name; how images are prepared, images, their config and classes, and what is said of them.

    Without data it is noise: of a net that was made in Python nobody may know what it is for.
    """
    checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format)
    meta, data, classes = checkpoint.meta, None, None
    if (
        meta is None
        or "_target_" in (meta.get("data") or {})
        or "_target_" in build.plain(cfg.data)
    ):
        subject = build_subject(cfg)
        net, name, source = subject.net, subject.name, subject.data
        data = build.plain(cfg.data) if "_target_" in cfg.data else dict(data_config(net))
        images = [
            images for images, _ in source.sample(cfg.split or source.evaluation_split, cfg.images)
        ]
        prepared, classes = source.settings, subject.classes
        shown = f"{count(sum(map(len, images)), 'image')} of {type(source).__name__.lower()}"
    else:
        net, name = build_from(checkpoint), meta["model"]["name"]
        prepared, images, shown = (
            data_settings(data_config(net)),
            [],
            f"{IMAGES} images of noise; data=... has others",
        )
    return net, name, prepared, images, data, classes, shown


def _target(cfg: DictConfig) -> Path:
    if cfg.format.name != "onnx" and not cfg.dynamic_batch:
        raise UsageError("dynamic_batch=False: only for format=onnx")
    outputs.check_own(Path(cfg.run_dir), cfg.command)
    target = Path(cfg.file) if cfg.file else Path(cfg.run_dir) / NAMES[cfg.format.name]
    suffix = Path(NAMES[cfg.format.name]).suffix
    if target.suffix != suffix:
        raise UsageError(
            f"file={str(target)!r}: must end in {suffix} with format={cfg.format.name}"
        )
    check_not_folder(target, "file")
    if target.exists() and not cfg.overwrite:
        raise UsageError(
            f"{target} exists already; set overwrite=true to replace it, or file=... or run_dir=... to write elsewhere"
        )
    return target


def _words(value: Any) -> str:
    """A result for people: `float 1,794,374, int8 476,290`, by runtime where it is known by runtime."""
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, dict):
        joint, between = (
            ("; ", ": ") if any(isinstance(one, dict) for one in value.values()) else (", ", " ")
        )
        return joint.join(f"{key}{between}{_words(one)}" for key, one in value.items())
    return (
        "yes"
        if value is True
        else "no"
        if value is False
        else "not measured"
        if value is None
        else f"{value:,}"
    )


def _beside_float(
    path: Path, plain: nn.Module, image: torch.Tensor, checked: Checked, repeats: int
) -> dict[str, Any]:
    """Bytes of the file and of the same net in float and, in ONNX, with weights of 8 bits (values random); its time where it runs."""
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float"}
        if EXECUTORCH in checked.agreement:
            files["float"].write_bytes(to_pte(plain, image)[0])
        else:
            files["float"].write_bytes(export_float(plain, image).SerializeToString())
            files["int8"] = Path(folder) / "int8"
            quantize_8bit(files["float"], files["int8"])
        files["this"] = path
        times: dict[str, dict[str, float]] = {}
        for runtime, found in checked.agreement.items() if repeats else ():
            if found.images:
                sessions = {
                    name: open_session(file, runtime, threads=1) for name, file in files.items()
                }
                times[runtime] = {
                    name: round(one, 3)
                    for name, one in milliseconds(sessions, image, repeats).items()
                }
        sizes = {name: file.stat().st_size for name, file in files.items()}
    agrees = {runtime: found.problem is None for runtime, found in checked.agreement.items()}
    shares = {runtime: round(taken["this"] / taken["float"], 3) for runtime, taken in times.items()}
    return {
        "bytes": sizes,
        "agrees": agrees,
        "latency_ms": times or None,
        "time_of_float": shares or None,
    }
