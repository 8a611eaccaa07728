"""Files in onnxruntime, OpenVINO and ExecuTorch: what they give on images, compared with their net, and how long they take."""

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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.model.sites import iter_quantizers
from qat.quantizers import UniformGrid
from qat.utils.probing import probing

INPUT, OUTPUT = "image", "logits"
ONNXRUNTIME, OPENVINO, EXECUTORCH = "onnxruntime", "openvino", "executorch"
# Of logits.
TOLERANCE = 1e-4
# Of images with other logits, how many are looked into.
EXAMINED = 16
# A float32 value that is a sum of a few hundred terms is known to about this share of the largest value of its tensor: so close to a
# threshold its code may be either one, and the codes of the layers after it follow.
ROUNDING = 2e-5
# Runtimes compute in integers where a graph looked into step by step does not, and may round values on thresholds the other way. On more
# than this share of the images it means that they compute something else.
UNLIKE = 0.1

# Takes names of values and images (B, C, H, W), gives the values.
Session = Callable[[Sequence[str], np.ndarray], list[np.ndarray]]
# By name of the quantizer, in the order in which they run: where values lie on the axis of codes, and their codes.
Codes = dict[str, tuple[Tensor, Tensor]]
CodesOf = Callable[[Tensor], tuple[Tensor, Codes]]


@dataclass
class Agreement:
    """A file in one runtime beside its net.

    Attributes:
        images: how many.
        same_top1: images on which both name the same class.
        other_logits: images whose logits differ by more than the tolerance.
        largest: largest difference of the logits of the other images.
        apart: largest difference of the logits, as a share of the largest logit.
        unlike: of the images with other logits that were looked into, those on which the file is not what its graph gives step by step.
        problem: why the file must not be used in this runtime; None if it agrees.
    """

    images: int = 0
    same_top1: int = 0
    other_logits: int = 0
    largest: float = 0.0
    apart: float = 0.0
    unlike: int = 0
    problem: str | None = None

    def to_text(self) -> str:
        """What matters in a line for people."""
        return f"same class on {self.same_top1} of {self.images} images"


@dataclass
class Checked:
    """A file beside its net, by runtime.

    Onnxruntime decides whether a file is good; OpenVINO, where it is installed and reads the file (INT2 it does not), makes mistakes of
    its own where a file takes any number of images (docs/deployment.md#openvino).
    """

    agreement: dict[str, Agreement]

    @property
    def problem(self) -> str | None:
        """Why the file must not be used; None if it agrees."""
        return next(
            (
                f"{name}: {found.problem}"
                for name, found in self.agreement.items()
                if name != OPENVINO and found.problem
            ),
            None,
        )

    @property
    def top1(self) -> float:
        """Percent of the images on which both name the same class, the lowest of the runtimes that run the file."""
        return min(
            100 * found.same_top1 / found.images
            for found in self.agreement.values()
            if found.images
        )

    def to_text(self) -> str:
        """Lines for people."""
        lines = [
            f"{name}: {found.to_text()}" for name, found in self.agreement.items() if found.images
        ]
        if OPENVINO in self.agreement and (text := self.agreement[OPENVINO].problem):
            lines.append(f"not for OpenVINO: {text}")
        return "\n".join(lines)


def check_onnx(net: nn.Module, path: Path, batches: Iterable[Tensor]) -> Checked:
    """Run a file and the net that it was made from on the same images (B, C, H, W) each."""
    import onnx  # noqa: PLC0415  (an extra)

    model, batches, checked = onnx.load(str(path)), list(batches), Checked({})
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None
    for runtime in (ONNXRUNTIME, OPENVINO) if has_openvino() else (ONNXRUNTIME,):
        try:
            logits = functools.partial(logits_of, open_session(path, runtime), batch=batch)
            checked.agreement[runtime] = found = compare(
                net, logits, functools.partial(graph_codes, model, runtime), batches
            )
            if found.problem:
                found.problem += f"; {found.to_text()}, logits apart by up to {found.apart:.1%} of the largest one"
        except RuntimeError as error:
            if runtime != OPENVINO:
                raise
            lines = [
                line for line in str(error).splitlines() if not line.startswith("Exception from ")
            ]  # its own source files
            checked.agreement[runtime] = Agreement(
                problem=f"it fails ({' '.join(' '.join(lines).split())[:200]})"
            )
    return checked


def compare(
    net: nn.Module,
    logits: Callable[[Tensor], Tensor],
    open_codes: Callable[[], CodesOf] | None,
    batches: Iterable[Tensor],
) -> Agreement:
    """Compare another form of a net with it.

    Args:
        net: quantized, frozen or not.
        logits: of the other form.
        open_codes: gives what gives logits and codes of the other form for one image (1, C, H, W); None = logits alone can be compared,
            and no problem is found.
        batches: images (B, C, H, W) each.
    """
    images: list[Tensor] = []
    both: list[tuple[Tensor, Tensor]] = []
    for x in batches:
        with probing(net, ()):
            both.append((net(x), logits(x)))
        images += x.split(1)
    theirs, mine = map(torch.cat, zip(*both, strict=True))
    apart = (theirs - mine).abs().amax(1)
    same = apart <= TOLERANCE  # False of NaN
    other = (~same).nonzero().flatten().tolist()
    found = Agreement(
        len(images),
        int((theirs.argmax(1) == mine.argmax(1)).sum()),
        len(other),
        max([0.0, *apart[same].tolist()]),
    )
    found.apart = float(apart.max() / theirs.abs().max().clamp_min(TOLERANCE))
    if open_codes is None:
        return found
    codes_of: Any = open_codes() if other else None
    for i in other[:EXAMINED]:
        step_by_step = codes_of(images[i])
        found.unlike += not bool(((mine[i] - step_by_step[0]).abs() <= TOLERANCE).all())
        found.problem = found.problem or _first_difference(net_codes(net, images[i]), step_by_step)
    examined = min(len(other), EXAMINED)
    if found.problem is None and found.unlike * len(other) > UNLIKE * len(images) * examined:
        found.problem = f"on {found.unlike} of {examined} images its output differs from that of its graph run operator by operator"
    return found


def _first_difference(theirs: tuple[Tensor, Codes], mine: tuple[Tensor, Codes]) -> str | None:
    """What is wrong with the first quantizer whose codes differ, unless the values that they were made of lie on a threshold."""
    for name, (place, codes) in mine[1].items():
        other_place, others = (t.reshape(codes.shape) for t in theirs[1][name])
        differs = codes != others
        if differs.any():
            is_near = (place - other_place)[differs].abs().max() <= ROUNDING * (
                1 + codes.abs().max()
            )
            return None if is_near else f"codes of {name} differ away from a threshold"
    apart = float((theirs[0] - mine[0]).abs().max())
    return (
        None
        if apart <= TOLERANCE
        else f"logits differ by {apart:.1e} where no code does; must be at most {TOLERANCE:.0e}"
    )


def net_codes(net: nn.Module, image: Tensor) -> tuple[Tensor, Codes]:
    """Logits of a net for an image, and the codes of its activations."""
    seen: Codes = {}

    def hook(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def note(quantizer: Any, args: tuple[Tensor, ...]) -> None:
            if isinstance(grid := quantizer.grid(args[0]), UniformGrid):
                seen[name] = grid.to_code_coordinates(args[0]), quantizer.codes(args[0]).float()

        return note

    sites = [
        site for site in iter_quantizers(net) if not site.is_weight and not site.quantizer.is_float
    ]
    with probing(
        net, [site.quantizer.register_forward_pre_hook(hook(site.name)) for site in sites]
    ):
        out: Tensor = net(image)
    return out, seen


def graph_codes(model: Any, runtime: str) -> CodesOf:
    """What gives logits and codes of an ONNX model: a copy of it whose outputs are what its quantizers take and give, too."""
    from onnx import ModelProto, ValueInfoProto, numpy_helper  # noqa: PLC0415  (an extra)

    shown = ModelProto()
    shown.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in shown.graph.initializer}
    quantizers = [node for node in shown.graph.node if node.op_type == "QuantizeLinear"]
    names = list(
        dict.fromkeys(
            name for node in quantizers for name in (node.input[0], node.output[0]) if name != INPUT
        )
    )
    shown.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = open_session(shown.SerializeToString(), runtime)

    def run(image: Tensor) -> tuple[Tensor, Codes]:
        values = dict(
            zip(
                [OUTPUT, *names],
                map(torch.from_numpy, session([OUTPUT, *names], image.numpy())),
                strict=True,
            )
        )
        values[INPUT] = image
        seen = {}
        for node in quantizers:
            step, added = (float(numpy_helper.to_array(constants[name])) for name in node.input[1:])
            seen[node.name] = values[node.input[0]] / step, values[node.output[0]].float() - added
        return values[OUTPUT], seen

    return run


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


@functools.cache
def _openvino() -> Any:
    """One for as long as the process lives: with it goes the stack that OpenVINO gave to signal handlers, and the next signal crashes."""
    # absl, which comes along, later closes what is stderr now, unless that is the process's own.
    with contextlib.redirect_stderr(sys.__stderr__):
        import openvino  # noqa: PLC0415  (an extra)

    return openvino.Core()


def open_session(
    model: Path | bytes, runtime: str = ONNXRUNTIME, *, threads: int = 0, precision: str = "f32"
) -> Session:
    """Open a file, or a model in memory, on the CPU.

    Args:
        model: which.
        runtime: `onnxruntime`, `openvino` or `executorch`.
        threads: 0 = a thread a core; ExecuTorch has one number of threads for all files, and here it is 1.
        precision: in OpenVINO, of what is not on integers; its own choice is `bf16` where the processor has it.
    """
    given = model if isinstance(model, bytes) else model.read_bytes()
    if runtime == EXECUTORCH:
        return _open_executorch(given)
    if runtime == OPENVINO:
        # Where only weights are quantized it would quantize activations to 8 bits on processors that have integer products.
        config = {
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "INFERENCE_NUM_THREADS": str(threads),
        }
        compiled = _openvino().compile_model(
            _openvino().read_model(io.BytesIO(given)), "CPU", config
        )

        def run(names: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
            found = compiled([images])
            return [found[name].copy() for name in names]

        return run
    import onnxruntime  # noqa: PLC0415  (an extra)

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    if saturates():  # then products with int8 weights are computed with uint8 weights
        settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(given, settings, providers=["CPUExecutionProvider"])
    return lambda names, images: session.run(list(names), {INPUT: images})


@functools.cache
def saturates() -> bool:
    """Return whether onnxruntime's sums of uint8 times int8 saturate on this processor, as they do on x86 without VNNI."""
    import onnxruntime  # noqa: PLC0415  (an extra)
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415  (an extra)

    largest = np.full((16, 16), 127, np.int8)
    node = helper.make_node("MatMulInteger", ["left", "right"], ["sums"])
    left = helper.make_tensor_value_info("left", TensorProto.UINT8, (16, 16))
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, (16, 16))
    graph = helper.make_graph(
        [node], "product", [left], [sums], [numpy_helper.from_array(largest, "right")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"left": np.full((16, 16), 255, np.uint8)})
    return bool((result != 16 * 255 * 127).any())


@quiet()
def _open_executorch(given: bytes) -> Session:
    from executorch.extension.pybindings import portable_lib  # noqa: PLC0415  (an extra)
    from executorch.runtime import Runtime  # noqa: PLC0415  (an extra)

    # It writes what it finds out of the processor to the process's stderr.
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        portable_lib._unsafe_reset_threadpool(1)
        program: Any = Runtime.get().load_program(given)
        method = program.load_method("forward")
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)

    def run(
        names: Sequence[str], images: np.ndarray, kept: Any = program
    ) -> list[np.ndarray]:  # the method does not hold its program
        return [out.numpy() for out in method.execute([torch.from_numpy(images)])]

    return run


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
    for _ in range(repeats + 1):
        for name, session in sessions.items():
            began = time.perf_counter()
            session([OUTPUT], array)
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: statistics.median(times[1:]) for name, times in taken.items()
    }  # the first one allocates


@quiet()
def quantize_8bit(source: Path, target: Path) -> None:
    """Quantize a float file by onnxruntime itself: weights of 8 bits, ranges of inputs found as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  (slow to import)

    quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8)
