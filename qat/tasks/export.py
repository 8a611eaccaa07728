"""`export.py`: a file to deploy.

The file is written under another name, compared with the checkpoint, and renamed only if the two
agree.
"""

from __future__ import annotations

import glob
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from qat.data import DataSettings
from qat.data.image_transform import data_settings
from qat.errors import UsageError
from qat.export.check import CheckResult, compare, outputs_and_codes
from qat.export.onnx_file import (
    NUM_NOISE_IMAGES,
    OnnxSettings,
    export_float,
    preprocessing,
    require_installed,
    write_checked,
    write_onnx,
)
from qat.export.pte import to_pte, write_pte
from qat.export.runtimes import (
    EXECUTORCH,
    ONNXRUNTIME,
    OPENVINO,
    int8_sums_saturate,
    milliseconds,
    open_session,
    quantize_8bit,
)
from qat.launch import run_dir as outputs
from qat.model.checkpoint import read_checkpoint
from qat.model.convert import conversion_of
from qat.model.freeze import freeze
from qat.model.frozen import is_frozen
from qat.model.metadata import describe
from qat.model.packed import write_packed
from qat.model.storage import build_from, float_twin, load
from qat.model.transform import data_config
from qat.tasks import build, summary
from qat.tasks.report import report_run
from qat.tasks.results import recipe_fields, record_run, write_results
from qat.tasks.set_up import set_up
from qat.tasks.subject import build_evaluated_net, origin
from qat.utils.files import check_not_folder, remove_unfinished
from qat.utils.text import format_count
from qat.utils.validate import check_choice, check_int

log = logging.getLogger(__name__)

FILE_NAMES = {"onnx": "net.onnx", "packed": "net.safetensors", "executorch": "net.pte"}
# Log texts for results whose keys are not self-explanatory.
_TITLES = {
    "latency_ms": "ms per image",
    "float_products": "products in float",
    "outside_xnnpack": "outside XNNPACK",
    "logits_apart": "difference / largest logit",
}


class _Source(NamedTuple):
    """The model to export, and the images on which it is compared.

    Attributes:
        net: the model.
        name: name of the model.
        preprocessing_settings: settings with which images for the model are prepared.
        images: batches of images; empty = unknown data, so noise is used.
        data: data config to store in the file; None = unknown data.
        classes: names of the classes; None = unknown.
        description: description of the images in words.
    """

    net: nn.Module
    name: str
    preprocessing_settings: DataSettings
    images: list[torch.Tensor]
    data: dict[str, Any] | None
    classes: list[str] | None
    description: str


def export(cfg: DictConfig) -> float:
    """Write one checkpoint to a deployable file.

    Args:
        cfg: config composed from `conf/export.yaml`; `cfg.run_dir` is the job's directory.

    Returns:
        Percentage of images with the same class in file and model, in the worst runtime.

    Raises:
        UsageError: a setting, path or file cannot be used, or the written file disagrees with the
            model; the file is then kept as `<file>.rejected`.
    """
    start_time = time.monotonic()
    set_up(cfg)
    check_int("latency", cfg.latency, 0)
    check_choice("format.name", cfg.format.name, tuple(FILE_NAMES))
    if not cfg.ckpt:
        raise UsageError("ckpt is not set: must be a checkpoint of train.py or ptq.py")
    file_format = cfg.format.name
    if file_format != "packed":
        require_installed(file_format)
    settings = _onnx_settings(cfg)
    build.import_modules(cfg.model.imports)
    target = _target_path(cfg)

    source = _load_source(cfg)
    net = source.net
    conversion = conversion_of(net)
    if conversion is None:
        raise UsageError(
            f"ckpt={origin(cfg)!r}: contains a float model; must be a quantized model "
            "of train.py or ptq.py"
        )
    input_size = conversion.input_size
    images = source.images or list(torch.randn(NUM_NOISE_IMAGES, *input_size).split(8))
    frozen_net = net if is_frozen(net) else freeze(net)
    meta = describe(frozen_net, data=source.data, classes=source.classes)
    if file_format == "onnx":
        meta["preprocessing"] = preprocessing(source.preprocessing_settings)
    entries = {"weights": origin(cfg), "checked on": source.description, "file": str(target)}
    summary.announce("export", net, source.name, conversion.recipe, input_size, **entries)
    record_run(cfg)
    # A killed run may have left unfinished files next to `file`, outside the run directory.
    unfinished_patterns = [f"{prefix}{glob.escape(target.name)}" for prefix in ("", ".unchecked.")]
    remove_unfinished(target.parent, unfinished_patterns)

    results: dict[str, Any] = {}

    def write(path: Path) -> CheckResult:
        if file_format == "onnx":
            return write_onnx(path, frozen_net, net, meta, images, settings)
        if file_format == "executorch":
            checked, details = write_pte(path, frozen_net, net, images)
            results.update(details)
            return checked
        results["bytes"] = write_packed(frozen_net, path, meta)
        loaded_net = load(path)
        agreement = compare(net, loaded_net, lambda: partial(outputs_and_codes, loaded_net), images)
        return CheckResult({"qat.load": agreement})

    checked = write_checked(target, write)
    if file_format != "packed":
        float_net = float_twin(frozen_net)
        results |= _compare_with_float(cfg, target, float_net, images[0][:1], checked)
    size = target.stat().st_size
    _log_results(checked, results, f"{target}, {size:,} bytes")
    ways_to_run = _ways_to_run(file_format, settings, checked)
    _log_ways_to_run(ways_to_run, results.get("time_of_float") or {})
    write_results(
        cfg,
        model=source.name,
        **recipe_fields(conversion.recipe),
        weights=origin(cfg),
        size_bytes=size,
        file=str(target),
        agreement=checked.top1,
        **results,
        wall_seconds=round(time.monotonic() - start_time, 1),
    )
    report_run(cfg, None if is_frozen(net) else net, input_size)
    return checked.top1


def _onnx_settings(cfg: DictConfig) -> OnnxSettings:
    if cfg.format.name != "onnx":
        return OnnxSettings()
    form = cfg.format
    return OnnxSettings(cfg.dynamic_batch, form.target, form.two_bit, form.cpu, form.precision)


def _load_source(cfg: DictConfig) -> _Source:
    """The model of `ckpt`, with images of its data if the data are known."""
    checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format)
    meta = checkpoint.meta
    has_data_setting = "_target_" in cfg.data
    if meta is not None and "_target_" not in (meta.get("data") or {}) and not has_data_setting:
        net = build_from(checkpoint)
        return _Source(
            net,
            meta["model"]["name"],
            data_settings(data_config(net)),
            images=[],
            data=None,
            classes=None,
            description=f"{NUM_NOISE_IMAGES} images of noise; set data=... to use real ones",
        )
    subject = build_evaluated_net(cfg)
    data = subject.data
    split = cfg.split or data.evaluation_split
    images = [batch for batch, _ in data.sample(split, cfg.images)]
    num_images = sum(map(len, images))
    return _Source(
        subject.net,
        subject.name,
        data.settings,
        images,
        data=build.to_plain(cfg.data),
        classes=subject.classes,
        description=f"{format_count(num_images, 'image')} of {type(data).__name__.lower()}",
    )


def _target_path(cfg: DictConfig) -> Path:
    if cfg.format.name != "onnx" and not cfg.dynamic_batch:
        raise UsageError(
            "dynamic_batch=false: works only with format=onnx; "
            f"must be true with format={cfg.format.name}"
        )
    outputs.check_own(Path(cfg.run_dir), cfg.command)
    target = Path(cfg.file) if cfg.file else Path(cfg.run_dir) / FILE_NAMES[cfg.format.name]
    suffix = Path(FILE_NAMES[cfg.format.name]).suffix
    if target.suffix != suffix:
        raise UsageError(
            f"file={str(target)!r}: must end in {suffix} with format={cfg.format.name}"
        )
    check_not_folder(target, "file")
    if target.exists() and not cfg.overwrite:
        raise UsageError(
            f"{target} exists already; set overwrite=true to replace it, "
            "or file=... or run_dir=... to write elsewhere"
        )
    return target


def _compare_with_float(
    cfg: DictConfig, path: Path, float_net: nn.Module, image: torch.Tensor, checked: CheckResult
) -> dict[str, Any]:
    """Size and time of a file, compared with files of the same model in float.

    For ONNX, a file with 8-bit weights is compared too. The weights in these other files are
    random.

    Args:
        cfg: config of the command; `latency` is the number of timed runs, 0 = do not measure times.
        path: the file.
        float_net: the same architecture in float.
        image: (1, C, H, W).
        checked: runtimes that run the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float"}
        if EXECUTORCH in checked.agreement:
            files["float"].write_bytes(to_pte(float_net, image)[0])
        else:
            model = export_float(float_net, image, dynamic_batch=cfg.dynamic_batch)
            files["float"].write_bytes(model.SerializeToString())
            files["int8"] = Path(folder) / "int8"
            quantize_8bit(files["float"], files["int8"])
        files["this"] = path
        sizes = {name: file.stat().st_size for name, file in files.items()}
        times: dict[str, dict[str, float]] = {}
        for runtime, agreement in checked.agreement.items():
            if cfg.latency and agreement.images and agreement.problem is None:
                times[runtime] = _measure_times(files, runtime, image, cfg.latency)
    agreements = checked.agreement.items()
    time_of_float = {}
    for runtime, runtime_times in times.items():
        time_of_float[runtime] = round(runtime_times["this"] / runtime_times["float"], 3)
    return {
        "bytes": sizes,
        "agrees": {runtime: agreement.problem is None for runtime, agreement in agreements},
        "latency_ms": times or None,
        "time_of_float": time_of_float or None,
    }


def _measure_times(
    files: dict[str, Path], runtime: str, image: torch.Tensor, repeats: int
) -> dict[str, float]:
    """Milliseconds per image for each file in a runtime, with one thread."""
    sessions = {name: open_session(file, runtime, threads=1) for name, file in files.items()}
    times = milliseconds(sessions, image, repeats)
    return {name: round(time_ms, 3) for name, time_ms in times.items()}


def _log_results(checked: CheckResult, results: dict[str, Any], file: str) -> None:
    entries = {"file": file}
    for key, value in results.items():
        if key != "time_of_float":
            entries[_TITLES.get(key, key)] = _to_text(value)
    log.info("%s\n%s", checked.to_text(), summary.aligned_lines("written", entries))


class _WayToRun(NamedTuple):
    """A way to run a file.

    Attributes:
        target: runtime and processor.
        advice: settings with which to run the file, or the reason not to run it.
        runtime: key of the target in measured times; None = not timed here.
    """

    target: str
    advice: str
    runtime: str | None = None


def _ways_to_run(file_format: str, settings: OnnxSettings, checked: CheckResult) -> list[_WayToRun]:
    """Ways to run the file; docs/deployment.md has the measurements behind the advice."""
    if file_format == "packed":
        return [_WayToRun("qat", "qat.load(file), or ckpt=file in a command")]
    if file_format == "executorch":
        return [_WayToRun("ExecuTorch", "one image at a time, with XNNPACK", EXECUTORCH)]
    if settings.target == "tensorrt":
        advice = "reads scales from the file, needs no calibration; qat has not tested it"
        return [_WayToRun("TensorRT", advice)]

    with_vnni = without_vnni = "default settings"
    openvino = "INFERENCE_PRECISION_HINT=f32, DYNAMIC_QUANTIZATION_GROUP_SIZE=0"
    if settings.cpu == "any":
        with_vnni += "; with format.cpu=fast 8-bit weights are faster"
    else:
        without_vnni = "wrong results; export with format.cpu=any"
        openvino += "; only with VNNI or on ARM"
    agreement = checked.agreement.get(OPENVINO)
    if agreement is None:
        openvino += "; not checked, as it is not installed"
    elif agreement.problem:
        openvino = "do not use"
    is_without_vnni = int8_sums_saturate()
    return [
        _WayToRun(
            "onnxruntime, with VNNI or on ARM", with_vnni, None if is_without_vnni else ONNXRUNTIME
        ),
        _WayToRun(
            "onnxruntime, other CPUs", without_vnni, ONNXRUNTIME if is_without_vnni else None
        ),
        _WayToRun("OpenVINO", openvino, OPENVINO),
    ]


def _log_ways_to_run(ways_to_run: list[_WayToRun], time_of_float: dict[str, float]) -> None:
    entries = {}
    for way in ways_to_run:
        entries[way.target] = way.advice
        if way.runtime in time_of_float:
            ratio = time_of_float[way.runtime]
            entries[way.target] += f"; {ratio:.2f} of float's time (this machine, 1 thread)"
    log.info("%s", summary.aligned_lines("run it in", entries))


def _to_text(value: Any) -> str:
    """A result as text, such as `float 1,794,374, int8 476,290`, grouped by runtime if nested."""
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, dict):
        texts = {key: _to_text(inner) for key, inner in value.items()}
        if any(isinstance(inner, dict) for inner in value.values()):
            return "; ".join(f"{key}: {text}" for key, text in texts.items())
        return ", ".join(f"{key} {text}" for key, text in texts.items())
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}"
