"""An ONNX file with all that is needed to use it, beside a float and an 8-bit file of the same net."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from torch import Tensor, nn

from qat.export.artefact import Written
from qat.export.check import check_onnx, table
from qat.export.graph import ANY_BATCH, LOWEST_OPSET, FreeDimensions, export_graph, to_onnx
from qat.export.session import OPTIONS_KEY, SESSION_OPTIONS, milliseconds, open_session
from qat.model.checkpoint import built_alike
from qat.model.convert import conversion_of
from qat.spec import recipe
from qat.utils.files import replacing

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


@dataclass(frozen=True)
class OnnxSettings:
    """How a file is written.

    Attributes:
        opset: None = the lowest that does.
        dynamic_batch: any number of images.
        dynamic_size: images of any size.
        two_bit: see `qat.export.stored_weights.stored_form`.
        latency: images that are timed; 0 = none.
        threads: of onnxruntime while it is timed.
    """

    opset: int | None = None
    dynamic_batch: bool = True
    dynamic_size: bool = False
    two_bit: str = "int2"
    latency: int = 20
    threads: int = 1


def onnx_artefact(
    path: Path, frozen: nn.Module, net: nn.Module, meta: Mapping[str, Any], images: Sequence[Tensor], settings: OnnxSettings
) -> Written:
    """Write a file, run it beside its net, time it.

    Args:
        path: the file.
        frozen: what is written.
        net: what it was frozen from.
        meta: of `qat.model.checkpoint.describe`, and `preprocessing`: size, mean, std, interpolation, crop_pct.
        images: (B, C, H, W) each.
        settings: of the file.

    Raises:
        UsageError: see `to_onnx`.
    """
    image, shape = images[0][:1], FreeDimensions(settings.dynamic_batch, settings.dynamic_size)
    model = to_onnx(frozen, image, opset=settings.opset, shape=shape, two_bit=settings.two_bit)
    describe_file(model, meta)
    save(model, path)
    checked = check_onnx(frozen, net, path, images)
    rows, measured = _beside(path, frozen, image, settings)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    notes = [checked.to_text(), f"opset {opset}", table(rows)]
    if checked.plain:
        share = f"{100 * checked.plain:.0f} % of the images"
        notes.insert(1, f"a session without the options {json.dumps(SESSION_OPTIONS)} gives other logits on {share}")
    if checked.refused:
        notes.insert(1, f"a session needs the options {json.dumps(SESSION_OPTIONS)}; without them: {checked.refused}")
    return Written(checked, "\n".join(notes), {"opset": opset, "session_options": SESSION_OPTIONS, **measured})


def describe_file(model: onnx.ModelProto, meta: Mapping[str, Any]) -> None:
    """Write into a model what its user needs: names of classes, treatment of images, session options; and what net it is."""
    said = {
        "qat": {key: meta[key] for key in ("format_version", "model", "recipe", "input_size")},
        "qat.classes": list(meta.get("classes") or []),
        "qat.preprocessing": meta["preprocessing"],
        OPTIONS_KEY: SESSION_OPTIONS,
    }
    model.producer_name = "qat"
    for key, value in said.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, whole or not at all."""
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))


def _beside(path: Path, frozen: nn.Module, image: Tensor, settings: OnnxSettings) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Sizes and times of the file, and of the same net in float and with weights of 8 bits; their values are random."""
    done = conversion_of(frozen)
    assert done is not None  # noqa: S101  (frozen nets are quantized)
    plain = built_alike(frozen, recipe("fp"), done.input_size)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx", "this": path}
        onnx.save(export_graph(plain, image, LOWEST_OPSET, ANY_BATCH), str(files["float"]))
        _eight_bits(files["float"], files["int8"])
        sizes = {name: file.stat().st_size for name, file in files.items()}
        times: dict[str, float] = {}
        if settings.latency:
            sessions: dict[str, InferenceSession] = {name: open_session(file, threads=settings.threads) for name, file in files.items()}
            times = milliseconds(sessions, image, settings.latency)
    rows = {
        name: {"bytes": f"{size:,}", "of float": f"{size / sizes['float']:.3f}"} | ({"ms an image": f"{times[name]:.2f}"} if times else {})
        for name, size in sizes.items()
    }
    return rows, {"bytes": sizes, "latency_ms": times or None}


def _eight_bits(source: Path, target: Path) -> None:
    """By onnxruntime itself: weights of 8 bits, ranges of inputs found as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  (slow to import)

    logging.disable(logging.WARNING)  # it tells the root logger of every product that stays in float
    try:
        quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
