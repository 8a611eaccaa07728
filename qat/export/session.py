"""ONNX files in onnxruntime: the options that keep its products exact, logits, time, and what arrives at quantizers."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.export.graph import IN_CODES, INPUT, OUTPUT
from qat.model.frozen.agreement import QuantizerTrace, Watched

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# The first has weights taken back to float once, when a file is opened, in place of at every call, and no integer operators made of what
# stands between quantizers: some take fewer kinds of scales and codes than a file has. Without both a product of a float factor
# and a weight of few bits is computed with that factor rounded to 8 bits, if nothing stands between the weight and the product.
SESSION_OPTIONS = {"session.disable_quant_qdq": "1", "session.qdq_matmulnbits_accuracy_level": "0"}
OPTIONS_KEY = "qat.session_options"


def open_session(
    model: str | Path | bytes, *, options: Mapping[str, str] | None = None, level: str = "ORT_ENABLE_ALL", threads: int = 0
) -> onnxruntime.InferenceSession:
    """Open a file, or a model in memory, on the CPU.

    Args:
        model: which.
        options: session options; None = those that the file names of itself.
        level: onnxruntime's name of how far it changes the graph.
        threads: 0 = a thread a core.
    """
    import onnxruntime  # noqa: PLC0415  (an extra)

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for key, value in (own_options(model) if options is None else options).items():
        settings.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(model) if isinstance(model, Path) else model, settings, providers=["CPUExecutionProvider"])


def own_options(model: str | Path | bytes) -> dict[str, str]:
    """Session options that a file names of itself, of those in `SESSION_OPTIONS`."""
    import onnx  # noqa: PLC0415

    content = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model), load_external_data=False)
    found = next((entry.value for entry in content.metadata_props if entry.key == OPTIONS_KEY), "{}")
    told = json.loads(found)
    # Of the ones that exporting writes alone: others change what a session reads and writes.
    return {key: str(told[key]) for key in SESSION_OPTIONS if isinstance(told, dict) and key in told}


def logits_of(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    """(B, classes) of images (B, C, H, W); one by one where the file takes no more."""
    return outputs_of(session, images, [OUTPUT], [OUTPUT])[OUTPUT]


def outputs_of(
    session: onnxruntime.InferenceSession, images: Tensor, names: Sequence[str], of_images: Collection[str]
) -> dict[str, Tensor]:
    """Values of a graph by name for all images; those that are not `of_images` once."""
    takes = session.get_inputs()[0].shape[0]
    size = takes if isinstance(takes, int) else len(images)
    parts = [session.run(names, {INPUT: part.numpy()}) for part in images.cpu().float().split(size)]
    values = {name: [torch.from_numpy(one) for one in found] for name, *found in zip(names, *parts, strict=True)}
    return {name: torch.cat(found) if name in of_images else found[0] for name, found in values.items()}


def milliseconds(sessions: Mapping[str, onnxruntime.InferenceSession], image: Tensor, repeats: int) -> dict[str, float]:
    """Median time of one image in each session, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    feed = {INPUT: image.cpu().float().numpy()}
    for turn in range(repeats + 1):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run([OUTPUT], feed)
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
        from onnx import ModelProto, ValueInfoProto  # noqa: PLC0415

        shown = ModelProto()
        shown.CopyFrom(model)
        self.places: dict[str, tuple[str, str]] = {}
        for node in shown.graph.node:
            if node.op_type == "QuantizeLinear":
                self.places[node.name] = node.input[0], node.output[0]
        self.of_images = _of_images(shown)
        present = {value.name for value in (*shown.graph.output, *shown.graph.input)}
        self.names = [name for name in dict.fromkeys(name for place in self.places.values() for name in place) if name not in present]
        shown.graph.output.extend(ValueInfoProto(name=name) for name in self.names)
        self.session = open_session(shown.SerializeToString(), level=level)

    def run(self, images: Tensor) -> Watched:
        """Logits, and what its quantizers see and give."""
        found = {INPUT: images.cpu().float()} | outputs_of(self.session, images, [OUTPUT, *self.names], self.of_images)
        seen = {
            name.removesuffix(IN_CODES): QuantizerTrace(found[value], found[codes], name.endswith(IN_CODES))
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
