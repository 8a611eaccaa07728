"""Time and bytes of exported files, relative to float: the table of docs/deployment.md.

`make latency` runs this in onnxruntime, OpenVINO and ExecuTorch, which take turns. The models have
random weights and offsets; trained models take the same time.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import timm
import torch
from torch import nn

import qat
from evidence.speed.timing import machine, table
from qat.export.onnx_file import OnnxSettings, export_float, to_onnx
from qat.export.pte import to_pte
from qat.export.runtimes import (
    EXECUTORCH,
    INPUT,
    ONNXRUNTIME,
    OPENVINO,
    has_openvino,
    milliseconds,
    open_session,
    quantize_8bit,
)

NETS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224"]
RECIPES = [
    "ofq_2bit",
    "ofq_noqkr_2bit",
    "ofq_noqkr_4bit",
    "seq_2bit",
    "seq_4bit",
    "deploy_w8a8",
    "deploy_w4a4",
]
SIZE = (3, 224, 224)
DYNAMIC = "int8 of onnxruntime, dynamic"
STATIC = "int8 of onnxruntime, static"
FLOAT = "float"
FLOAT_BF16 = "float, in bfloat16"
RUNTIMES = [ONNXRUNTIME, *([OPENVINO] if has_openvino() else [])]
# Cells of a table by file and column.
Rows = dict[str, dict[str, str]]


def main() -> None:
    """Print a table for each model, with a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=NETS, help="timm models")
    parser.add_argument(
        "--recipes", nargs="*", default=RECIPES, help="presets of qat.recipe, NAME or NAME_5bit"
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--images", type=int, default=160, help="number of images for each file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine(), flush=True)
    for name in args.nets:
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(name, args.recipes, Path(folder))
            rows = measure(name, files, args)
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = []
        for file, row in rows.items():
            lines.append([file, *(row.get(column, "") for column in columns)])
        print(table([name, *columns], lines), flush=True)


def measure(name: str, files: Mapping[str, Path], args: argparse.Namespace) -> Rows:
    """Time the files of a model with each batch size.

    Args:
        name: timm name of the model.
        files: ONNX files.
        args: options of the command.
    """
    rows: Rows = {}
    for file, path in files.items():
        rows[file] = {"MB": f"{path.stat().st_size / 1e6:.2f}"}
    if has_openvino():
        rows[FLOAT_BF16] = {}
    sessions = open_sessions(name, files, args.recipes)
    for batch in args.batches:
        chosen = sessions
        if batch != 1:
            # ExecuTorch's files accept only one image at a time.
            chosen = {
                key: session for key, session in sessions.items() if not key.endswith(EXECUTORCH)
            }
        images = torch.randn(batch, *SIZE)
        times = milliseconds(chosen, images, max(args.images // batch, 5))
        baseline = times[f"{FLOAT}/{ONNXRUNTIME}"]
        for key, time in times.items():
            file, runtime = key.split("/")
            rows[file][f"batch {batch}, {runtime}"] = f"{time / baseline:.2f}"
        rows[FLOAT][f"batch {batch}, ms"] = f"{baseline:.3g}"
    return rows


def open_sessions(name: str, files: Mapping[str, Path], recipes: list[str]) -> dict[str, Any]:
    """Sessions by `FILE/RUNTIME`, of all installed runtimes."""
    sessions = {}
    for file, path in files.items():
        for runtime in RUNTIMES:
            sessions[f"{file}/{runtime}"] = open_session(path, runtime, threads=1)
    if has_openvino():
        # This is OpenVINO's default for float files on processors with bfloat16.
        sessions[f"{FLOAT_BF16}/{OPENVINO}"] = open_session(
            files[FLOAT], OPENVINO, threads=1, precision="bf16"
        )
    if importlib.util.find_spec(EXECUTORCH):
        for file, data in write_pte_files(name, recipes).items():
            sessions[f"{file}/{EXECUTORCH}"] = open_session(data, EXECUTORCH)
    return sessions


def write_files(name: str, recipes: list[str], folder: Path) -> dict[str, Path]:
    """Write ONNX files of the float model, onnxruntime's own 8-bit models, and each recipe."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        """Images for onnxruntime's calibration."""

        batches = iter([{INPUT: torch.randn(2, *SIZE).numpy()}])

        def get_next(self) -> dict[str, object] | None:
            """Return the next batch, or None after the last one."""
            return next(self.batches, None)

    image = torch.randn(1, *SIZE)
    paths = {file: folder / f"{file}.onnx" for file in (FLOAT, DYNAMIC, STATIC, *recipes)}
    onnx.save(export_float(of_timm(name).eval(), image), str(paths[FLOAT]))
    quantize_8bit(paths[FLOAT], paths[DYNAMIC])
    quantize_static(
        str(paths[FLOAT]),
        str(paths[STATIC]),
        Batches(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    for file in recipes:
        frozen = qat.freeze(random_net(name, file))
        onnx.save(to_onnx(frozen, image, OnnxSettings(cpu="fast")), str(paths[file]))
        if file.startswith("deploy"):
            any_cpu = f"{file}, format.cpu=any"
            paths[any_cpu] = folder / f"{any_cpu}.onnx"
            onnx.save(to_onnx(frozen, image), str(paths[any_cpu]))
    return paths


def write_pte_files(name: str, recipes: list[str]) -> dict[str, bytes]:
    """Contents of .pte files for the float model and for each recipe that XNNPACK supports."""
    image = torch.randn(1, *SIZE)
    nets = {FLOAT: of_timm(name)}
    for recipe in recipes:
        if recipe.startswith("deploy"):
            nets[recipe] = qat.freeze(random_net(name, recipe))
    return {file: to_pte(net, image)[0] for file, net in nets.items()}


def of_timm(name: str) -> nn.Module:
    """A float model with random weights."""
    sizes = {"img_size": 224} if "dinov2" in name else {}
    return timm.create_model(name, **sizes)


def random_net(name: str, recipe: str) -> nn.Module:
    """A quantized model that was never trained, with offsets that are not zero."""
    torch.manual_seed(0)
    width = re.fullmatch(r"(\w+)_(\d)bit", recipe)
    chosen = qat.recipe(width[1], bits=int(width[2])) if width else qat.recipe(recipe)
    net = qat.convert(of_timm(name), chosen, input_size=SIZE)
    qat.initialize_scales(net, [torch.randn(8, *SIZE)])
    for key, parameter in net.named_parameters():
        if "offset" in key:
            nn.init.normal_(parameter, std=0.02)
    return net.eval()


if __name__ == "__main__":
    main()
