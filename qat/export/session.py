"""ONNX files in the runtimes that they are checked in: logits, time, and what arrives at quantizers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qat.export.graph import INPUT, OUTPUT
from qat.model.frozen.agreement import QuantizerTrace, Watched

if TYPE_CHECKING:
    import onnx

# To which onnxruntime changes the graph: little, and as much as it can; and OpenVINO, where it is installed.
LEVELS = ("ORT_ENABLE_BASIC", "ORT_ENABLE_ALL")
OPENVINO = "OpenVINO"


class Onnxruntime:
    """A file that is open on the CPU, by onnxruntime.

    Args:
        model: a file, or a model in memory.
        level: onnxruntime's name of how far it changes the graph.
        threads: 0 = a thread a core.

    Attributes:
        batch: images that it takes at a time, None = any number.
    """

    def __init__(self, model: Path | bytes, level: str, threads: int) -> None:
        import onnxruntime  # noqa: PLC0415  (an extra)

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = threads
        settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        given = str(model) if isinstance(model, Path) else model
        self._session = onnxruntime.InferenceSession(given, settings, providers=["CPUExecutionProvider"])
        takes = self._session.get_inputs()[0].shape[0]
        self.batch = takes if isinstance(takes, int) else None

    def run(self, names: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
        """Values by name."""
        found: list[np.ndarray] = self._session.run(list(names), {INPUT: images})
        return found


@functools.cache
def _core() -> Any:
    """One for as long as the process lives: with it goes the stack that OpenVINO gave to signal handlers, and the next signal crashes."""
    # absl, which comes along, later closes what is stderr now, unless that is the process's own.
    with contextlib.redirect_stderr(sys.__stderr__):
        import openvino  # noqa: PLC0415  (an extra)

    return openvino.Core()


class OpenVino:
    """A file that is open on the CPU, by OpenVINO.

    Args:
        model: a file, or a model in memory.
        threads: 0 = a thread a core.
        precision: of what is not on integers; OpenVINO's own choice is `bf16` where the processor has it.
    """

    def __init__(self, model: Path | bytes, threads: int, precision: str = "f32") -> None:
        given = io.BytesIO(model) if isinstance(model, bytes) else str(model)
        # Behind weights alone it would quantize activations to 8 bits where the processor has integer products.
        config = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} | (
            {"INFERENCE_NUM_THREADS": threads} if threads else {}
        )
        self._model = _core().compile_model(_core().read_model(given), "CPU", config)
        takes = self._model.inputs[0].get_partial_shape()[0]
        self.batch = takes.get_length() if takes.is_static else None

    def run(self, names: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
        """Values by name."""
        found = self._model([images])
        return [found[name].copy() for name in names]


Session = Onnxruntime | OpenVino


def open_session(model: Path | bytes, *, level: str = LEVELS[-1], threads: int = 0) -> Session:
    """Open a file, or a model in memory.

    Args:
        model: which.
        level: one of `LEVELS`, or `OPENVINO`.
        threads: 0 = a thread a core.
    """
    return OpenVino(model, threads) if level == OPENVINO else Onnxruntime(model, level, threads)


def has_openvino() -> bool:
    """True if it is installed."""
    return importlib.util.find_spec("openvino") is not None


def logits_of(session: Session, images: Tensor) -> Tensor:
    """(B, classes) of images (B, C, H, W); one by one where the file takes no more."""
    return outputs_of(session, images, [OUTPUT], [OUTPUT])[OUTPUT]


def outputs_of(session: Session, images: Tensor, names: Sequence[str], of_images: Collection[str]) -> dict[str, Tensor]:
    """Values of a graph by name for all images; those that are not `of_images` once."""
    parts = [session.run(names, part.numpy()) for part in images.cpu().float().split(session.batch or len(images))]
    values = {name: [torch.from_numpy(one) for one in found] for name, *found in zip(names, *parts, strict=True)}
    return {name: torch.cat(found) if name in of_images else found[0] for name, found in values.items()}


def milliseconds(sessions: Mapping[str, Session], image: Tensor, repeats: int) -> dict[str, float]:
    """Median time of one image in each session, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    array = image.cpu().float().numpy()
    for turn in range(repeats + 1):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run([OUTPUT], array)
            if turn:  # the first one allocates
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in taken.items()}


class Transparent:
    """A model that also gives what arrives at its quantizers.

    Args:
        model: of `to_onnx`.
        level: see `open_session`.
    """

    def __init__(self, model: onnx.ModelProto, level: str = "ORT_ENABLE_BASIC") -> None:
        from onnx import ModelProto, ValueInfoProto, numpy_helper  # noqa: PLC0415

        shown = ModelProto()
        shown.CopyFrom(model)
        self.places: dict[str, tuple[str, str]] = {}
        self.added: dict[str, int] = {}
        self.steps: dict[str, float] = {}
        constants = {tensor.name: tensor for tensor in shown.graph.initializer}
        for node in shown.graph.node:
            if node.op_type == "QuantizeLinear":
                self.places[node.name] = node.input[0], node.output[0]
                self.added[node.name] = int(numpy_helper.to_array(constants[node.input[2]]))
                self.steps[node.name] = float(numpy_helper.to_array(constants[node.input[1]]))
        self.of_images = _of_images(shown)
        present = {value.name for value in (*shown.graph.output, *shown.graph.input)}
        self.names = [name for name in dict.fromkeys(name for place in self.places.values() for name in place) if name not in present]
        shown.graph.output.extend(ValueInfoProto(name=name) for name in self.names)
        self.session = open_session(shown.SerializeToString(), level=level)

    def run(self, images: Tensor) -> Watched:
        """Logits, and what its quantizers see and give."""
        found = {INPUT: images.cpu().float()} | outputs_of(self.session, images, [OUTPUT, *self.names], self.of_images)
        seen = {
            name: QuantizerTrace(found[value] / self.steps[name], found[codes].short() - self.added[name], in_codes=True)
            for name, (value, codes) in self.places.items()
        }
        return found[OUTPUT], seen


def _of_images(model: onnx.ModelProto) -> set[str]:
    """Names of the values that depend on the images; of an embedding of positions there is one for all."""
    found = {INPUT}
    for node in model.graph.node:
        if found.intersection(node.input):
            found.update(node.output)
    return found
