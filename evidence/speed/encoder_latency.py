"""Time exported encoders of Transformers in onnxruntime, relative to their float models.

Each encoder is also compared with onnxruntime's own 8-bit model. The models have random weights and
run on one image in one thread; the files take turns.
Run: `python -m evidence.speed.encoder_latency | tee evidence/logs/latency-encoders.log`.
"""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

import qat
from evidence.speed.timing import environment, ratio, table, take_turns
from qat.export.onnx_file import export_float
from qat.export.runtimes import open_session, quantize_8bit

SIZE = (3, 224, 224)
OUTPUT = "pooler_output"
FLOAT = "float"
DYNAMIC = "int8 of onnxruntime, dynamic"
RECIPE = "deploy_w8a8"
ENCODERS = {
    "DINOv2-S/14": functools.partial(
        Dinov2Model,
        Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14),
    ),
    "SigLIP-B/16": functools.partial(SiglipVisionModel, SiglipVisionConfig()),
}


def main() -> None:
    """Print a table with a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", nargs="*", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{environment()}; transformers {transformers.__version__}", flush=True)
    image = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(0))
    for name in args.encoders:
        steps: dict[str, Any] = {}
        megabytes = {}
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(name, image, Path(folder))
            for file, path in files.items():
                session = open_session(path, threads=1)
                steps[file] = functools.partial(session, [OUTPUT], image.numpy())
                megabytes[file] = path.stat().st_size / 1e6
        timings = take_turns(steps, args.rounds)
        rows = []
        for file, timing in timings.items():
            milliseconds = 1e3 * min(timing.cpu)
            share = ratio(timing, timings[FLOAT])
            rows.append([file, f"{megabytes[file]:.1f}", f"{milliseconds:.1f}", share])
        head = [name, "MB", "ms, lowest", "CPU time of float, median [range], wall"]
        print(table(head, rows), flush=True)


def write_files(name: str, image: torch.Tensor, folder: Path) -> dict[str, Path]:
    """Write the float model, onnxruntime's own 8-bit model of it, and qat's quantized model."""
    paths = {file: folder / f"{file}.onnx" for file in (FLOAT, DYNAMIC, RECIPE)}
    torch.manual_seed(0)
    net = ENCODERS[name]().eval()
    onnx.save(export_float(net, image), str(paths[FLOAT]))
    quantize_8bit(paths[FLOAT], paths[DYNAMIC])
    qat.convert(net, qat.recipe(RECIPE), input_size=SIZE)
    qat.initialize_scales(net, [image])
    checked = qat.export_onnx(net, paths[RECIPE], images=image, cpu="fast")
    print(f"{name}: {checked.to_text()}", flush=True)
    return paths


if __name__ == "__main__":
    main()
