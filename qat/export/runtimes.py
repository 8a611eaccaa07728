"""Run files in onnxruntime, OpenVINO and ExecuTorch on the CPU: outputs and latency."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
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

from qat.errors import UsageError
from qat.nn import LOGITS

INPUT = "image"
OUTPUT = LOGITS
ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
EXECUTORCH = "executorch"

# Function that takes names of outputs, and images (B, C, H, W), and returns these outputs. With
# ExecuTorch, it ignores the names and returns all outputs.
Session = Callable[[Sequence[str], np.ndarray], list[np.ndarray]]


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Suppress what other libraries report: logs up to WARNING, warnings, and `sys.stdout`."""
    previous_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)


def has_openvino() -> bool:
    """True if OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def open_session(
    model: Path | bytes, runtime: str = ONNXRUNTIME, *, threads: int = 0, precision: str = "f32"
) -> Session:
    """Open a file, or a model in memory, on the CPU.

    Args:
        model: path or contents of the file.
        runtime: `onnxruntime`, `openvino` or `executorch`.
        threads: number of threads; 0 = one per core. ExecuTorch has only one setting for the whole
            process, which this function sets to 1.
        precision: type in which OpenVINO computes float operators; its own default is `bf16` if the
            processor supports it.

    Raises:
        UsageError: onnxruntime cannot open the file.
        RuntimeError: OpenVINO or ExecuTorch cannot open the file.
    """
    content = model if isinstance(model, bytes) else model.read_bytes()
    if runtime == EXECUTORCH:
        return _open_executorch(content)
    if runtime == OPENVINO:
        return _open_openvino(content, threads, precision)
    return _open_onnxruntime(content, threads)


def _open_onnxruntime(content: bytes, threads: int) -> Session:
    import onnx  # noqa: PLC0415  (an extra)
    import onnxruntime  # noqa: PLC0415  (an extra)

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    if int8_sums_saturate():
        # This setting converts int8 weights of products to uint8, whose sums do not saturate.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    constants = onnx.load_from_string(content).graph.initializer
    if any(constant.data_type == onnx.TensorProto.FLOAT8E4M3FN for constant in constants):
        # Otherwise, onnxruntime fuses products into an operator that does not accept E4M3.
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(
            content, settings, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        reason = str(error)[:200]
        raise UsageError(f"format=onnx: onnxruntime cannot open the file ({reason})") from error
    return lambda names, images: session.run(list(names), {INPUT: images})


@functools.cache
def int8_sums_saturate() -> bool:
    """True if onnxruntime's sums of uint8 * int8 saturate on this machine (x86 without VNNI)."""
    import onnxruntime  # noqa: PLC0415  (an extra)
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415  (an extra)

    size = 16
    node = helper.make_node("MatMulInteger", ["left", "right"], ["sums"])
    left = helper.make_tensor_value_info("left", TensorProto.UINT8, (size, size))
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, (size, size))
    right = numpy_helper.from_array(np.full((size, size), 127, np.int8), "right")
    graph = helper.make_graph([node], "product", [left], [sums], [right])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"left": np.full((size, size), 255, np.uint8)})
    return bool((result != size * 255 * 127).any())


@functools.cache
def _openvino_core() -> Any:
    """OpenVINO's core, created once per process.

    The core is never closed, because closing would free the stack that OpenVINO provides for signal
    handlers, and the next signal would crash the process.
    """
    # OpenVINO imports absl, which later closes the current `sys.stderr`, unless this is the stderr
    # of the process.
    with contextlib.redirect_stderr(sys.__stderr__):
        import openvino  # noqa: PLC0415  (an extra)

    return openvino.Core()


def _open_openvino(content: bytes, threads: int, precision: str) -> Session:
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        # Otherwise OpenVINO quantizes activations of models with quantized weights to 8 bits, on
        # processors that have instructions for integer products.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": str(threads),
    }
    model = _openvino_core().read_model(io.BytesIO(content))
    compiled = _openvino_core().compile_model(model, "CPU", config)

    def run(names: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
        values = compiled([images])
        return [values[name].copy() for name in names]

    return run


@quiet()
def _open_executorch(content: bytes) -> Session:
    from executorch.extension.pybindings import portable_lib  # noqa: PLC0415  (an extra)
    from executorch.runtime import Runtime  # noqa: PLC0415  (an extra)

    # Hide what ExecuTorch writes about the processor to the stderr of the process.
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        portable_lib._unsafe_reset_threadpool(1)
        program: Any = Runtime.get().load_program(content)
        method = program.load_method("forward")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)

    # The default argument keeps the program alive; the method itself does not.
    def run(names: Sequence[str], images: np.ndarray, owner: Any = program) -> list[np.ndarray]:
        return [out.numpy() for out in method.execute([torch.from_numpy(images)])]

    return run


def session_outputs(
    session: Session, names: Sequence[str], images: Tensor, batch: int | None = None
) -> dict[str, Tensor]:
    """Run a session on images, and return its outputs (B, ...) by name.

    Args:
        session: a result of `open_session`.
        names: names of outputs.
        images: (B, C, H, W).
        batch: number of images that the file takes at a time; None = any number.
    """
    parts = []
    for part in images.cpu().float().split(batch or len(images)):
        parts.append(session(names, part.numpy()))
    outputs = {}
    arrays_of_outputs = zip(*parts, strict=True)
    for name, arrays in zip(names, arrays_of_outputs, strict=True):
        outputs[name] = torch.cat(list(map(torch.from_numpy, arrays)))
    return outputs


def session_logits(session: Session, images: Tensor, batch: int | None = None) -> Tensor:
    """Compute the output `logits` for images; see `session_outputs`."""
    return session_outputs(session, [OUTPUT], images, batch)[OUTPUT]


def milliseconds(sessions: Mapping[str, Session], image: Tensor, repeats: int) -> dict[str, float]:
    """Median time in ms of an image (1, C, H, W) in each session; the sessions run alternately."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    array = image.cpu().float().numpy()
    for _ in range(repeats + 1):
        for name, session in sessions.items():
            start = time.perf_counter()
            session([OUTPUT], array)
            times[name].append(1e3 * (time.perf_counter() - start))
    # Leave out the first run, which allocates memory.
    return {name: statistics.median(session_times[1:]) for name, session_times in times.items()}


@quiet()
def quantize_8bit(source: Path, target: Path) -> None:
    """Quantize a float file with onnxruntime: 8-bit weights, input ranges measured at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  (slow import)

    quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8)
