"""The table of docs/deployment.md#time: exported files beside float's file of the same net, in onnxruntime and OpenVINO, in turns.

Run by `make latency`: nets with random weights and offsets, whose times are those of trained ones. Checkpoints of the small net, which
`python -m studies run` leaves, take its place by `--trained`, and are tried on CIFAR-10's test images.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

import qat
from evidence.timing import machine
from qat.data import Cifar10
from qat.export.onnx_file import export_float, to_onnx
from qat.export.runtimes import (
    INPUT,
    ONNXRUNTIME,
    OPENVINO,
    Session,
    has_openvino,
    logits_of,
    milliseconds,
    open_session,
    quantize_8bit,
)

# The last one is that of docs/results.md.
CIFAR = "CIFAR-10 net"
NETS = {
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    CIFAR: "vit_tiny_patch16_224",
}
_SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "num_classes": 10,
    "global_pool": "avg",
    "class_token": False,
}
RECIPES = ["ofq_2bit", "ofq_noqkr_2bit", "ofq_noqkr_4bit", "seq_2bit", "seq_4bit", "deploy_w8a8", "deploy_w4a4"]
# Its default where the processor has it.
BFLOAT = "float, in bfloat16"
DYNAMIC, STATIC = "int8 of onnxruntime, dynamic", "int8 of onnxruntime, static"
RUNTIMES = {"onnxruntime": ONNXRUNTIME, **({"OpenVINO": OPENVINO} if has_openvino() else {})}


def main() -> None:
    """Print a row a file."""
    args = _arguments()
    logging.disable(logging.WARNING)
    print(machine(), flush=True)
    trained = dict(one.split("=", 1) for one in args.trained)
    rows: dict[str, dict[str, str]] = {}
    for name in args.nets:
        given = trained if name == CIFAR else {}
        data = _cifar10(args.root) if given and args.root else None
        with tempfile.TemporaryDirectory() as folder:
            calibration = data.sample("train", 64) if data else [(torch.randn(2, *_size(name)), None)] * 2
            files = _files(name, args.recipes, Path(folder), given, [images.numpy() for images, _ in calibration])
            for file, path in files.items():
                row = rows.setdefault(f"{name}, {file}", {"MB": f"{path.stat().st_size / 1e6:.2f}"})
                if data and file in {*given, DYNAMIC, STATIC}:
                    row["top-1"] = f"{_top1(path, data):.2f}"
            sessions: dict[str, Session] = {
                f"{file}, {runtime}": open_session(path, level, threads=1)
                for file, path in files.items()
                for runtime, level in RUNTIMES.items()
            }
            if OPENVINO in RUNTIMES.values():
                sessions[f"{BFLOAT}, OpenVINO"] = open_session(files["float"], OPENVINO, threads=1, precision="bf16")
            for batch in args.batches:
                taken = milliseconds(sessions, torch.randn(batch, *_size(name)), max(args.images // batch, 5))
                baseline = taken["float, onnxruntime"]
                for session, one in taken.items():
                    file, runtime = session.rsplit(", ", 1)
                    rows.setdefault(f"{name}, {file}", {})[f"batch {batch}, {runtime}"] = f"{one / baseline:.2f}"
                rows[f"{name}, float"][f"batch {batch}, ms"] = f"{baseline:.3g}"
        print(table({key: row for key, row in rows.items() if key.startswith(name)}), flush=True)
    print(table(rows))


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Rows by name, columns by name, as plain text."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [["", *columns], *([name, *(row.get(column, "") for column in columns)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(NETS), help="of the table, or names of timm")
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="presets of qat.recipe, NAME or NAME_5bit")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--images", type=int, default=160, help="that each file is timed on")
    parser.add_argument("--trained", nargs="*", default=[], metavar="NAME=CKPT", help=f"of the {CIFAR}: float=... or RECIPE=...")
    parser.add_argument("--root", help="folder of CIFAR-10, for --trained")
    return parser.parse_args()


def _size(name: str) -> tuple[int, int, int]:
    return (3, 32, 32) if name == CIFAR else (3, 224, 224)


def _files(name: str, recipes: list[str], folder: Path, trained: Mapping[str, str], calibration: list[np.ndarray]) -> dict[str, Path]:
    image = torch.randn(1, *_size(name))
    plain = qat.load(trained["float"]) if "float" in trained else _timm(name)
    paths = {file: folder / f"{file}.onnx" for file in dict.fromkeys(("float", DYNAMIC, STATIC, *recipes, *trained))}
    onnx.save(export_float(plain.eval(), image), str(paths["float"]))
    quantize_8bit(paths["float"], paths[DYNAMIC])
    calibrated = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    batches = _Batches(calibration)
    quantize_static(str(paths["float"]), str(paths[STATIC]), batches, op_types_to_quantize=["MatMul", "Gemm", "Conv"], **calibrated)
    for file in set(paths) - {"float", DYNAMIC, STATIC}:
        net = qat.load(trained[file]) if file in trained else random_net(name, _recipe(file))
        onnx.save(to_onnx(qat.freeze(net), image), str(paths[file]))
    return paths


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Images, as onnxruntime takes them."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self._left = iter([{INPUT: batch} for batch in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one."""
        return next(self._left, None)


def _timm(name: str) -> nn.Module:
    larger = {"img_size": 224} if "dinov2" in name else {}
    return timm.create_model(NETS.get(name, name), **(_SMALL if name == CIFAR else larger))


def _recipe(name: str) -> qat.QuantRecipe:
    width = re.fullmatch(r"(\w+)_(\d)bit", name)
    return qat.recipe(width[1], bits=int(width[2])) if width else qat.recipe(name)


def random_net(name: str, recipe: qat.QuantRecipe) -> nn.Module:
    """A quantized net that was never trained, with offsets that are not zero."""
    torch.manual_seed(0)
    net = qat.convert(_timm(name), recipe, input_size=_size(name))
    qat.initialize_scales(net, [torch.randn(8, *_size(name))])
    for key, parameter in net.named_parameters():
        if "offset" in key:
            nn.init.normal_(parameter, std=0.02)
    return net.eval()


def _cifar10(root: str) -> Cifar10:
    mean, std = (0.4911, 0.4820, 0.4466), (0.2453, 0.2428, 0.2606)
    fixed = {"image_size": 32, "patch_size": 8, "in_chans": 3, "num_classes": 10, "mean": mean, "std": std, "augment": "none", "hflip": 0.0}
    return Cifar10(**fixed, root=root, batch_size=500, num_workers=0, calibration_images=64, seed=0)


def _top1(file: Path, data: Cifar10) -> float:
    """Percent of the test images, in onnxruntime."""
    session = open_session(file)
    right = [(logits_of(session, images).argmax(1) == labels).float() for images, labels in data.test_dataloader()]
    return 100 * torch.cat(right).mean().item()


if __name__ == "__main__":
    main()
