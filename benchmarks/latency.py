"""The table of docs/deployment.md#time: exported files beside float's file of the same net, in onnxruntime and OpenVINO, in turns.

Run by `make latency`: nets with random weights and offsets, whose times are those of trained ones.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

import qat
from benchmarks.timing import machine
from qat.export.artefact_onnx import eight_bits
from qat.export.check import table
from qat.export.graph import ANY_BATCH, INPUT, LOWEST_OPSET, export_graph, to_onnx
from qat.export.session import LEVELS, OPENVINO, OpenVino, Session, has_openvino, milliseconds, open_session

NETS = {"DeiT-T": "deit_tiny_patch16_224", "DeiT-S": "deit_small_patch16_224", "Swin-T": "swin_tiny_patch4_window7_224"}
SIZE = (3, 224, 224)
RECIPES = {
    "ofq_2bit": qat.recipe("ofq", bits=2),
    "ofq_noqkr_2bit": qat.recipe("ofq_noqkr", bits=2),
    "ofq_noqkr_4bit": qat.recipe("ofq_noqkr", bits=4),
    "seq_2bit": qat.recipe("seq", bits=2),
    "seq_4bit": qat.recipe("seq", bits=4),
    "deploy_w8a8": qat.recipe("deploy_w8a8"),
    "deploy_w4a4": qat.recipe("deploy_w4a4"),
}
# Its default where the processor has it.
BFLOAT = "float, in bfloat16"
DYNAMIC, STATIC = "int8 of onnxruntime, dynamic", "int8 of onnxruntime, static"
RUNTIMES = {"onnxruntime": LEVELS[-1], **({"OpenVINO": OPENVINO} if has_openvino() else {})}


def main() -> None:
    """Print a row a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--images", type=int, default=160, help="that each file is timed on")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine(), flush=True)
    rows: dict[str, dict[str, str]] = {}
    for name in args.nets:
        with tempfile.TemporaryDirectory() as folder:
            files = _files(name, args.recipes, Path(folder))
            sessions: dict[str, Session] = {
                f"{file}, {runtime}": open_session(path, level=level, threads=1)
                for file, path in files.items()
                for runtime, level in RUNTIMES.items()
            }
            if OPENVINO in RUNTIMES.values():
                sessions[f"{BFLOAT}, OpenVINO"] = OpenVino(files["float"], 1, precision="bf16")
            sizes = {file: path.stat().st_size for file, path in files.items()}
            for batch in args.batches:
                taken = milliseconds(sessions, torch.randn(batch, *SIZE), max(args.images // batch, 5))
                for file in files:
                    row = rows.setdefault(f"{name}, {file}", {"MB": f"{sizes[file] / 1e6:.2f}"})
                    row |= {
                        f"batch {batch}, {runtime}": f"{taken[f'{file}, {runtime}'] / taken['float, onnxruntime']:.2f}"
                        for runtime in RUNTIMES
                    }
                if f"{BFLOAT}, OpenVINO" in taken:
                    rows.setdefault(f"{name}, {BFLOAT}", {})[f"batch {batch}, OpenVINO"] = (
                        f"{taken[f'{BFLOAT}, OpenVINO'] / taken['float, onnxruntime']:.2f}"
                    )
                rows[f"{name}, float"][f"batch {batch}, ms"] = f"{taken['float, onnxruntime']:.1f}"
        print(table({key: row for key, row in rows.items() if key.startswith(name)}), flush=True)
    print(table(rows))


def _files(name: str, recipes: list[str], folder: Path) -> dict[str, Path]:
    plain = timm.create_model(NETS[name]).eval()
    paths = {file: folder / f"{file}.onnx" for file in ("float", DYNAMIC, STATIC, *recipes)}
    onnx.save(export_graph(plain, torch.randn(1, *SIZE), LOWEST_OPSET, ANY_BATCH), str(paths["float"]))
    eight_bits(paths["float"], paths[DYNAMIC])
    calibrated = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(str(paths["float"]), str(paths[STATIC]), _Noise(), op_types_to_quantize=["MatMul", "Gemm", "Conv"], **calibrated)
    for recipe in recipes:
        onnx.save(to_onnx(qat.freeze(random_net(NETS[name], RECIPES[recipe])), torch.randn(1, *SIZE)), str(paths[recipe]))
    return paths


class _Noise(CalibrationDataReader):  # type: ignore[misc]
    """Two batches."""

    def __init__(self) -> None:
        self.batches = iter([{INPUT: torch.randn(2, *SIZE).numpy()} for _ in range(2)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one."""
        return next(self.batches, None)


def random_net(name: str, recipe: qat.QuantRecipe) -> nn.Module:
    """A quantized net that was never trained, with offsets that are not zero."""
    torch.manual_seed(0)
    net = qat.convert(timm.create_model(name), recipe, input_size=SIZE)
    qat.initialize_scales(net, [torch.randn(8, *SIZE)])
    for key, parameter in net.named_parameters():
        if "offset" in key:
            nn.init.normal_(parameter, std=0.02)
    return net.eval()


if __name__ == "__main__":
    main()
