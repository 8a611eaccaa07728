"""An ONNX file with all that is needed to use it, beside a float and an 8-bit file of the same net."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from qat.export.artefact import Written
from qat.export.check import Checked, table
from qat.export.graph import OnnxSettings, export_graph
from qat.export.onnx_file import write_onnx
from qat.export.session import LEVELS, OPENVINO, milliseconds, open_session
from qat.model.checkpoint import built_alike
from qat.model.convert import conversion_of
from qat.nn.attention import QkrAttention
from qat.spec import recipe

# docs/deployment.md#time; its matrix of keys is as many times as wide as there are heads.
_QKR = (
    "query-key reparameterization costs speed: with quant.attention=standard a file takes 0.91 (DeiT-T) and 0.74 (DeiT-S) of the time"
    " in onnxruntime, 0.81 and 0.59 in OpenVINO"
)
_RUNTIMES = {"onnxruntime": LEVELS[-1], "openvino": OPENVINO}


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
    model, checked = write_onnx(path, frozen, net, meta, images, settings)
    rows, measured = _beside(path, frozen, images[0][:1], settings, checked)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    notes = [checked.to_text(), f"opset {opset}", table(rows)]
    if any(isinstance(module, QkrAttention) for module in frozen.modules()):
        notes.append(_QKR)
    runs_in = {name: checked.differs(level) is None for name, level in _RUNTIMES.items() if level in checked.unlike}
    return Written(checked, "\n".join(notes), {"opset": opset, "agrees": runs_in, **measured})


def _beside(
    path: Path, frozen: nn.Module, image: Tensor, settings: OnnxSettings, checked: Checked
) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Sizes of the file, and of the same net in float and with weights of 8 bits, and times where it runs; their values are random."""
    done = conversion_of(frozen)
    assert done is not None  # noqa: S101  (frozen nets are quantized)
    plain = built_alike(frozen, recipe("fp"), done.input_size)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx", "this": path}
        onnx.save(export_graph(plain, image), str(files["float"]))
        eight_bits(files["float"], files["int8"])
        sizes = {name: file.stat().st_size for name, file in files.items()}
        times: dict[str, dict[str, float]] = {}
        for runtime, level in _RUNTIMES.items() if settings.latency else ():
            if level in checked.agreement:
                sessions = {name: open_session(file, level=level, threads=settings.threads) for name, file in files.items()}
                times[runtime] = milliseconds(sessions, image, settings.latency)
    rows = {
        name: {"bytes": f"{size:,}", "of float": f"{size / sizes['float']:.3f}"}
        | {f"ms, {runtime}": f"{found[name]:.2f} ({found[name] / times['onnxruntime']['float']:.2f})" for runtime, found in times.items()}
        for name, size in sizes.items()
    }
    return rows, {"bytes": sizes, "latency_ms": times or None}


def eight_bits(source: Path, target: Path) -> None:
    """Quantize a float file by onnxruntime itself: weights of 8 bits, ranges of inputs found as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  (slow to import)

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells the root logger of every product that stays in float
    try:
        quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8)
    finally:
        logging.disable(before)
