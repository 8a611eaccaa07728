"""The table of docs/deployment.md#time-and-bytes: exported files beside float's, in onnxruntime, OpenVINO and ExecuTorch, in turns.

Run by `make latency`: nets with random weights and offsets, whose times are those of trained ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import tempfile
from pathlib import Path

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
DYNAMIC, STATIC = "int8 of onnxruntime, dynamic", "int8 of onnxruntime, static"
RUNTIMES = [ONNXRUNTIME, *([OPENVINO] if has_openvino() else [])]


def main() -> None:
    """Print a table for each net, a row a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=NETS, help="of timm")
    parser.add_argument(
        "--recipes", nargs="*", default=RECIPES, help="presets of qat.recipe, NAME or NAME_5bit"
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--images", type=int, default=160, help="that each file is timed on")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine(), flush=True)
    for name in args.nets:
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(name, args.recipes, Path(folder))
            rows = {
                file: {"MB": f"{path.stat().st_size / 1e6:.2f}"} for file, path in files.items()
            }
            opened = {
                f"{file}/{one}": open_session(path, one, threads=1)
                for file, path in files.items()
                for one in RUNTIMES
            }
            if has_openvino():  # its default where the processor has it
                rows["float, in bfloat16"] = {}
                opened[f"float, in bfloat16/{OPENVINO}"] = open_session(
                    files["float"], OPENVINO, threads=1, precision="bf16"
                )
            if importlib.util.find_spec(EXECUTORCH):  # its files are for one image
                data = write_pte_files(name, args.recipes)
                opened |= {
                    f"{file}/{EXECUTORCH}": open_session(one, EXECUTORCH)
                    for file, one in data.items()
                }
            for batch in args.batches:
                fitting = {
                    key: one
                    for key, one in opened.items()
                    if batch == 1 or not key.endswith(EXECUTORCH)
                }
                taken = milliseconds(
                    fitting, torch.randn(batch, *SIZE), max(args.images // batch, 5)
                )
                baseline = taken[f"float/{ONNXRUNTIME}"]
                for key, one in taken.items():
                    file, runtime = key.split("/")
                    rows[file][f"batch {batch}, {runtime}"] = f"{one / baseline:.2f}"
                rows["float"][f"batch {batch}, ms"] = f"{baseline:.3g}"
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        print(
            table(
                [name, *columns],
                [
                    [file, *(row.get(column, "") for column in columns)]
                    for file, row in rows.items()
                ],
            ),
            flush=True,
        )


def write_files(name: str, recipes: list[str], folder: Path) -> dict[str, Path]:
    """An ONNX file of the float net, of its 8-bit forms by onnxruntime itself, and of each recipe."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        """Images, as onnxruntime takes them."""

        left = iter([{INPUT: torch.randn(2, *SIZE).numpy()}])

        def get_next(self) -> dict[str, object] | None:
            """The next ones."""
            return next(self.left, None)

    image = torch.randn(1, *SIZE)
    paths = {file: folder / f"{file}.onnx" for file in ("float", DYNAMIC, STATIC, *recipes)}
    onnx.save(export_float(of_timm(name).eval(), image), str(paths["float"]))
    quantize_8bit(paths["float"], paths[DYNAMIC])
    kind = {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
    }
    quantize_static(
        str(paths["float"]),
        str(paths[STATIC]),
        Batches(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        **kind,
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
    """A .pte file of the float net, and of each recipe that XNNPACK can hold."""
    image = torch.randn(1, *SIZE)
    nets = {"float": of_timm(name)} | {
        file: qat.freeze(random_net(name, file)) for file in recipes if file.startswith("deploy")
    }
    return {file: to_pte(net, image)[0] for file, net in nets.items()}


def of_timm(name: str) -> nn.Module:
    """A float net with random weights."""
    return timm.create_model(name, **({"img_size": 224} if "dinov2" in name else {}))


def random_net(name: str, recipe: str) -> nn.Module:
    """A quantized net that was never trained, with offsets that are not zero."""
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
