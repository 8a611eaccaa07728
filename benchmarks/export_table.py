"""The table of docs/deployment.md: bytes, agreement and time of exported files, of a trained net and of full-size nets with random weights.

Run by `make export-table`: checkpoints as they are, on the whole test set; behind them DeiT-T, DeiT-S and Swin-T at 8, 4, 3 and 2 bits.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import timm
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

import qat
from qat.export.artefact import packed_artefact
from qat.export.artefact_onnx import OnnxSettings, onnx_artefact
from qat.export.check import table
from qat.model.checkpoint import describe
from qat.tasks.evaluate import build_subject

NETS = {"DeiT-T": "deit_tiny_patch16_224", "DeiT-S": "deit_small_patch16_224", "Swin-T": "swin_tiny_patch4_window7_224"}
SIZE = (3, 224, 224)
PREPROCESSING = {"size": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
IMAGES, LATENCY = 16, 20  # of noise, that each file and its net are run on; that are timed


def main() -> None:
    """Print a row a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", nargs="*", help="checkpoints of train.py or ptq.py")
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--bits", nargs="*", type=int, default=[8, 4, 3, 2])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: dict[str, dict[str, str]] = {}
    for ckpt in args.ckpt:
        with initialize_config_dir(str(Path(qat.__file__).parents[1] / "conf"), version_base="1.3"):
            subject = build_subject(compose("eval", [f"ckpt={ckpt}"]))
        batches = [images for images, _ in subject.data.sample("test", None)]
        rows |= row(f"{ckpt}, W{subject.recipe.bits} A{subject.recipe.act_bits}", subject.net, batches)
    for name in args.nets:
        for bits in args.bits:
            rows |= row(f"{name}, W{bits} A{bits}", random_net(NETS[name], bits), list(torch.randn(IMAGES, *SIZE).split(8)))
    print(table(rows))


def random_net(name: str, bits: int) -> nn.Module:
    """A quantized net that was never trained, with offsets that are not zero."""
    torch.manual_seed(0)
    net = qat.convert(timm.create_model(name), qat.recipe("ofq", bits=bits), input_size=SIZE)
    qat.initialize_scales(net, [torch.randn(8, *SIZE)])
    for key, parameter in net.named_parameters():
        if "offset" in key:
            nn.init.normal_(parameter, std=0.02)
    return net.eval()


def row(name: str, net: nn.Module, batches: list[Tensor]) -> dict[str, dict[str, str]]:
    """One net in both formats."""
    frozen = qat.freeze(net)
    meta = describe(frozen)
    with tempfile.TemporaryDirectory() as folder:
        packed = packed_artefact(Path(folder) / "net.safetensors", frozen, net, meta, batches)
        size = (Path(folder) / "net.safetensors").stat().st_size
        meta |= {"preprocessing": PREPROCESSING}
        onnx = onnx_artefact(Path(folder) / "net.onnx", frozen, net, meta, batches, OnnxSettings(latency=LATENCY))
    sizes, times = onnx.results["bytes"], onnx.results["latency_ms"] or {}
    found = onnx.checked.agreement["ORT_ENABLE_BASIC"]
    made = {
        "float": f"{sizes['float'] / 1e6:.2f} MB",
        "packed": f"{size / 1e6:.2f}",
        "ONNX": f"{sizes['this'] / 1e6:.2f}",
        "ONNX int8": f"{sizes['int8'] / 1e6:.2f}",
        "top-1 agrees": f"{found.same_top1}/{found.images}",
        "flips": f"{found.flipped}",
        "ties": f"{found.ties}",
        "logits": f"{found.largest:.0e}",
        **{f"{key}, ms": f"{time:.1f}" for key, time in times.items()},
        "": packed.checked.problem or onnx.checked.problem or "",
    }
    print(name, made, flush=True)
    return {name: made}


if __name__ == "__main__":
    main()
