"""ONNX files in onnxruntime and OpenVINO: values, and time beside files of the same net in float and 8 bits."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

INPUT, OUTPUT = "image", "logits"
ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"


# Takes names of values and images (B, C, H, W), gives the values.
Session = Callable[[Sequence[str], np.ndarray], list[np.ndarray]]


@functools.cache
def _openvino() -> Any:
    """One for as long as the process lives: with it goes the stack that OpenVINO gave to signal handlers, and the next signal crashes."""
    # absl, which comes along, later closes what is stderr now, unless that is the process's own.
    with contextlib.redirect_stderr(sys.__stderr__):
        import openvino  # noqa: PLC0415  (an extra)

    return openvino.Core()


def open_session(model: Path | bytes, runtime: str = ONNXRUNTIME, *, threads: int = 0, precision: str = "f32") -> Session:
    """Open a file, or a model in memory, on the CPU.

    Args:
        model: which.
        runtime: `onnxruntime` or `openvino`.
        threads: 0 = a thread a core.
        precision: in OpenVINO, of what is not on integers; its own choice is `bf16` where the processor has it.
    """
    if runtime == OPENVINO:
        # Where only weights are quantized it would quantize activations to 8 bits on processors that have integer products.
        config = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        config |= {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
        given = io.BytesIO(model) if isinstance(model, bytes) else str(model)
        compiled = _openvino().compile_model(_openvino().read_model(given), "CPU", config)

        def run(names: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
            found = compiled([images])
            return [found[name].copy() for name in names]

        return run
    import onnxruntime  # noqa: PLC0415  (an extra)

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model) if isinstance(model, Path) else model, settings, providers=["CPUExecutionProvider"])
    return lambda names, images: session.run(list(names), {INPUT: images})


def has_openvino() -> bool:
    """True if it is installed."""
    return importlib.util.find_spec("openvino") is not None


def logits_of(session: Session, images: Tensor, batch: int | None = None) -> Tensor:
    """(B, classes) of images (B, C, H, W), of which the file takes `batch` at a time, None = any number."""
    parts = images.cpu().float().split(batch or len(images))
    return torch.cat([torch.from_numpy(session([OUTPUT], part.numpy())[0]) for part in parts])


def milliseconds(sessions: Mapping[str, Session], image: Tensor, repeats: int) -> dict[str, float]:
    """Median time of one image in each session, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    array = image.cpu().float().numpy()
    for turn in range(repeats + 1):
        for name, session in sessions.items():
            began = time.perf_counter()
            session([OUTPUT], array)
            if turn:  # the first one allocates
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in taken.items()}


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without what exporters and quantizers of others log, warn of and print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@quiet()
def quantize_8bit(source: Path, target: Path) -> None:
    """Quantize a float file by onnxruntime itself: weights of 8 bits, ranges of inputs found as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  (slow to import)

    quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8)
