"""Compare exported files with their models: outputs, and codes of activations."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.export.runtimes import (
    INPUT,
    ONNXRUNTIME,
    OPENVINO,
    has_openvino,
    open_session,
    session_outputs,
)
from qat.export.write import call_name
from qat.model.sites import iter_quantizers
from qat.nn import BOXES, LOGITS, named_outputs
from qat.quantizers import Fp8Grid, UniformGrid
from qat.utils.probing import probing

# Outputs of a model with logits count as equal if they differ by at most this; boxes are fractions
# of the image's sides. For other models, such as encoders, the limit is relative to the largest
# value of each output, if that is above 1.
TOLERANCE = 1e-4
# Maximum number of images whose codes are compared; only images whose outputs differ are examined.
MAX_EXAMINED = 16
# The error of a float32 sum of a few hundred terms, relative to the largest value in the tensor. A
# value this close to a threshold may get either code, which also changes the codes of later layers.
ROUNDING_ERROR = 2e-5
# Runtimes compute in integers some products that the graph, run operator by operator, computes in
# float, so values on thresholds may be rounded the other way. An image is unexplained if its
# outputs differ from the graph's by more than `TOLERANCE`, and by more than `MAX_ROUNDING_RATIO`
# times the effect of multiplying the image by `SLIGHT_FACTOR`. This effect counts only if the file
# differs from the model by at most `MAX_RELATIVE_ERROR`. If more than the fraction
# `MAX_UNEXPLAINED` of the images are unexplained, the runtime computes something else.
MAX_UNEXPLAINED = 0.1
MAX_ROUNDING_RATIO = 2
SLIGHT_FACTOR = 1 + 1e-6

# Difference of outputs, relative to the largest value, that rounding may cause.
MAX_RELATIVE_ERROR = 0.05

# By quantizer name (`call_name`), in the order in which quantizers run: values in units of codes
# before rounding, and codes. For E4M3: values divided by the scale, and the same values rounded.
Codes = dict[str, tuple[Tensor, Tensor]]
# Output tensors by name.
Outputs = dict[str, Tensor]
RunGraph = Callable[[Tensor], tuple[Outputs, Codes]]


@dataclass
class Agreement:
    """Comparison of a file in one runtime with its model.

    Attributes:
        images: number of compared images.
        same_top1: number of images on which file and model predict the same class: for a detector,
            in all matched queries; for a segmentation, in all pixels. 0 for encoders.
        num_differing: number of images whose outputs differ by more than `TOLERANCE`.
        max_error: maximum difference between outputs, over the images whose outputs differ by at
            most `TOLERANCE`.
        relative_error: maximum difference of an output on any image, relative to the largest value
            of the output.
        boxes: maximum difference of a detector's boxes, for matched queries, as a fraction of the
            image's sides; None for other models.
        cosine: lowest cosine similarity of an encoder's outputs; None if there are logits.
        num_unexplained: number of images on which the file also differs from its own graph, run
            operator by operator, by more than rounding explains. Only `MAX_EXAMINED` of the images
            in `num_differing` are examined.
        problem: reason not to use the file in this runtime; None = no problem was found.
    """

    images: int = 0
    same_top1: int = 0
    num_differing: int = 0
    max_error: float = 0.0
    relative_error: float = 0.0
    boxes: float | None = None
    cosine: float | None = None
    num_unexplained: int = 0
    problem: str | None = None

    def to_text(self) -> str:
        """Describe the comparison in one line for the user."""
        if self.cosine is not None:
            difference = f"{self.relative_error:.1e} of the largest number"
            return f"cosine at least {self.cosine:.6f}, outputs apart by up to {difference}"
        text = f"same class on {self.same_top1} of {self.images} images"
        if self.boxes is not None:
            text += f", boxes of matched queries apart by up to {self.boxes:.1e}"
        return text


@dataclass
class CheckResult:
    """Comparison of a file with its model in each runtime.

    OpenVINO does not decide whether a file is accepted. It is compared if it is installed; it
    cannot read INT2, and has faults of its own in files for any number of images
    (docs/deployment.md#openvino).
    """

    agreement: dict[str, Agreement]

    @property
    def problem(self) -> str | None:
        """Reason not to use the file; None if it agrees with the model."""
        for runtime, agreement in self.agreement.items():
            if runtime != OPENVINO and agreement.problem:
                return f"{runtime}: {agreement.problem}"
        return None

    @property
    def top1(self) -> float:
        """Lowest percentage of images with the same class, of runtimes that ran; 0 for encoders."""
        agreements = [agreement for agreement in self.agreement.values() if agreement.images]
        return min(100 * agreement.same_top1 / agreement.images for agreement in agreements)

    def to_text(self) -> str:
        """Describe the comparison in each runtime for the user."""
        lines = []
        for runtime, agreement in self.agreement.items():
            if agreement.images:
                lines.append(f"{runtime}: {agreement.to_text()}")
        if OPENVINO in self.agreement and self.agreement[OPENVINO].problem:
            lines.append(f"not for OpenVINO: {self.agreement[OPENVINO].problem}")
        return "\n".join(lines)


def check_onnx(net: nn.Module, path: Path, batches: Iterable[Tensor]) -> CheckResult:
    """Compare an ONNX file with its model on images (B, C, H, W), also in OpenVINO if installed.

    Raises:
        UsageError: onnxruntime cannot open the file.
    """
    import onnx  # noqa: PLC0415  (an extra)

    model = onnx.load(str(path))
    batches = list(batches)
    names = [output.name for output in model.graph.output]
    batch_size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None
    runtimes = (ONNXRUNTIME, OPENVINO) if has_openvino() else (ONNXRUNTIME,)
    constants = model.graph.initializer
    is_half = any(constant.data_type == onnx.TensorProto.FLOAT16 for constant in constants)
    result = CheckResult({})
    for runtime in runtimes:
        try:
            session = open_session(path, runtime)
            outputs = functools.partial(session_outputs, session, names, batch=batch_size)
            open_graph = None if is_half else functools.partial(graph_codes, model, runtime)
            agreement = compare(net, outputs, open_graph, batches)
            if is_half:
                check_difference(agreement, net, batches, lambda x: x.half().float(), factor=4)
        except RuntimeError as error:
            if runtime != OPENVINO:
                raise
            agreement = Agreement(problem=f"it fails ({_message(error)})")
        else:
            if agreement.problem:
                agreement.problem += f"; {agreement.to_text()}"
                if agreement.cosine is None:
                    difference = f"{agreement.relative_error:.1%} of the largest number"
                    agreement.problem += f", outputs apart by up to {difference}"
        result.agreement[runtime] = agreement
    return result


def check_difference(
    agreement: Agreement,
    net: nn.Module,
    images: Iterable[Tensor],
    rounding: Callable[[Tensor], Tensor],
    factor: float,
) -> None:
    """Record a problem if the exported form's outputs differ by more than rounding can explain.

    Args:
        agreement: result of `compare`; this function may set its `problem`.
        net: the model.
        images: (B, C, H, W) each.
        rounding: function that changes images slightly, to show how much values on thresholds can
            change the outputs.
        factor: outputs may differ by this multiple of what `rounding` changes in them, or by
            `MAX_RELATIVE_ERROR` if that is more.
    """
    rounded = compare(net, lambda x: net(rounding(x)), None, images)
    allowed = max(MAX_RELATIVE_ERROR, factor * rounded.relative_error)
    if not agreement.relative_error <= allowed:  # also for NaN
        agreement.problem = (
            f"an output differs by {agreement.relative_error:.1%} of its largest value; "
            f"must be at most {allowed:.1%}"
        )


def _message(error: RuntimeError) -> str:
    """An OpenVINO error's message, shortened to one line without names of source files."""
    lines = [line for line in str(error).splitlines() if not line.startswith("Exception from ")]
    return " ".join(" ".join(lines).split())[:200]


def compare(
    net: nn.Module,
    compute_outputs: Callable[[Tensor], object],
    open_graph: Callable[[], RunGraph] | None,
    batches: Iterable[Tensor],
) -> Agreement:
    """Compare an exported or rewritten version of a model with the model.

    Args:
        net: a quantized model, frozen or not.
        compute_outputs: function that computes the outputs of the other version, in a form that
            `named_outputs` accepts.
        open_graph: returns a function that maps an image (1, C, H, W) to outputs and codes of the
            other version; None = compare only outputs, and report no problem.
        batches: images (B, C, H, W) each.
    """
    images: list[Tensor] = []
    expected_batches: list[Outputs] = []
    actual_batches: list[Outputs] = []
    for x in batches:
        with probing(net, ()):
            expected_batches.append(named_outputs(net(x)))
            actual_batches.append(named_outputs(compute_outputs(x)))
        images += x.split(1)
    expected = _concatenate(expected_batches)
    actual = _match_queries(expected, _concatenate(actual_batches))
    differences = _differences(expected, actual)
    is_same = differences <= TOLERANCE  # False for NaN
    differing_images = (~is_same).nonzero().flatten().tolist()
    agreement = Agreement(
        images=len(images),
        num_differing=len(differing_images),
        max_error=max([0.0, *differences[is_same].tolist()]),
        relative_error=_largest(map(_relative_error, expected.values(), actual.values())),
    )
    if LOGITS in expected:
        is_same_class = _classes(expected[LOGITS]) == _classes(actual[LOGITS])
        agreement.same_top1 = int(is_same_class.all(1).sum())
    else:
        cosines = torch.cat(list(map(_cosines, expected.values(), actual.values())))
        agreement.cosine = float(cosines.min())
    if BOXES in expected:
        agreement.boxes = float((expected[BOXES] - actual[BOXES]).abs().max())
    if open_graph is None or not differing_images:
        return agreement

    run_graph = open_graph()
    examined_images = differing_images[:MAX_EXAMINED]
    for i in examined_images:
        graph_result = run_graph(images[i])
        image_outputs = {name: output[i : i + 1] for name, output in actual.items()}
        allowed = TOLERANCE
        if agreement.relative_error <= MAX_RELATIVE_ERROR:
            allowed = max(allowed, MAX_ROUNDING_RATIO * _effect_of_rounding(net, images[i]))
        equals_graph = float(_differences(image_outputs, graph_result[0])) <= allowed
        if not equals_graph:
            agreement.num_unexplained += 1
        if agreement.problem is None:
            expected_result = outputs_and_codes(net, images[i])
            agreement.problem = _first_difference(expected_result, graph_result)
    # Extrapolate from the examined images to all images whose outputs differ.
    extrapolated = agreement.num_unexplained * len(differing_images) / len(examined_images)
    if agreement.problem is None and extrapolated > MAX_UNEXPLAINED * len(images):
        agreement.problem = (
            f"on {agreement.num_unexplained} of {len(examined_images)} images, the output differs "
            "from that of the file's graph run operator by operator"
        )
    return agreement


def _effect_of_rounding(net: nn.Module, image: Tensor) -> float:
    """Difference of a model's outputs between an image and the slightly changed image."""
    with probing(net, ()):
        outputs = named_outputs(net(image))
        return float(_differences(outputs, named_outputs(net(image * SLIGHT_FACTOR))))


def _concatenate(batches: Iterable[Outputs]) -> Outputs:
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for outputs in batches:
        for name, output in outputs.items():
            parts[name].append(output)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _match_queries(expected: Outputs, actual: Outputs) -> Outputs:
    """Reorder a detector's queries to match the expected boxes and scores, one to one.

    A detector that selects queries by score may return them in another order. Outputs of other
    models are returned unchanged.
    """
    if BOXES not in expected:
        return actual
    from scipy.optimize import linear_sum_assignment

    expected_points = torch.cat([expected[BOXES], expected[LOGITS].sigmoid()], -1)
    points = torch.cat([actual[BOXES], actual[LOGITS].sigmoid()], -1)
    # Distances that are computed by matrix products would not be exact enough.
    distances = torch.cdist(expected_points, points, compute_mode="donot_use_mm_for_euclid_dist")
    # `linear_sum_assignment` takes no NaN.
    costs = distances.nan_to_num(nan=1e6).cpu()
    queries = torch.stack([torch.as_tensor(linear_sum_assignment(cost)[1]) for cost in costs])
    image_indices = torch.arange(len(points)).unsqueeze(1)
    return {name: output[image_indices, queries] for name, output in actual.items()}


def _differences(expected: Outputs, actual: Outputs) -> Tensor:
    """Maximum difference of all outputs for each image (B,), to compare with `TOLERANCE`."""
    actual = _match_queries(expected, actual)
    parts = []
    for name, output in expected.items():
        difference = (output - actual[name]).abs().flatten(1).amax(1)
        if LOGITS not in expected:
            difference = difference / output.abs().max().clamp_min(1)
        parts.append(difference)
    return torch.stack(parts).amax(0)


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    """Maximum difference, relative to the largest expected value."""
    return float((expected - actual).abs().max() / expected.abs().max().clamp_min(TOLERANCE))


def _largest(values: Iterable[float]) -> float:
    """The largest value; NaN if one of them is NaN, which Python's `max` may ignore."""
    return float(torch.tensor(list(values)).max())


def _cosines(expected: Tensor, actual: Tensor) -> Tensor:
    """Cosine similarity of expected and actual output of each image, (B,)."""
    return F.cosine_similarity(expected.flatten(1), actual.flatten(1))


def _classes(logits: Tensor) -> Tensor:
    """Predicted classes (B, N) from logits.

    Args:
        logits: (B, classes) of images, N = 1; (B, N, classes) of queries; or (B, classes, H, W) of
            pixels, N = H*W.
    """
    classes = logits.argmax(-1 if logits.ndim == 3 else 1)
    return classes.reshape(len(logits), -1)


def _first_difference(expected: tuple[Outputs, Codes], actual: tuple[Outputs, Codes]) -> str | None:
    """Describe the first difference of codes, or the difference of outputs if all codes agree.

    Returns None if nothing differs, or if the first codes that differ belong to values within
    rounding error of a threshold.
    """
    expected_outputs, expected_codes = expected
    outputs, actual_codes = actual
    for name, (coordinates, codes) in actual_codes.items():
        net_coordinates, net_codes = (t.reshape(codes.shape) for t in expected_codes[name])
        is_different = codes != net_codes
        if not is_different.any():
            continue
        distance = (coordinates - net_coordinates)[is_different].abs().max()
        if distance <= ROUNDING_ERROR * (1 + codes.abs().max()):
            return None
        return f"codes of {name} differ for values that are not on a threshold"
    difference = float(_differences(expected_outputs, outputs))
    if difference <= TOLERANCE:
        return None
    names = " and ".join(outputs)
    return f"{names} differ by {difference:.1e} with equal codes; must be at most {TOLERANCE:.0e}"


def outputs_and_codes(net: nn.Module, image: Tensor) -> tuple[Outputs, Codes]:
    """Outputs of a model for an image (1, C, H, W), and codes of uniform and E4M3 activations."""
    codes: Codes = {}

    def record(name: str, quantizer: Any, args: tuple[Tensor, ...]) -> None:
        (x, *_) = args
        grid = quantizer.grid(x)
        if isinstance(grid, UniformGrid):
            call = call_name(name, codes)
            codes[call] = (grid.to_code_coordinates(x), quantizer.codes(x).float())
        elif isinstance(grid, Fp8Grid):
            values = quantizer.codes(x).view(torch.float8_e4m3fn).float()
            codes[call_name(name, codes)] = (x / grid.scales, values)

    hooks = []
    for site in iter_quantizers(net):
        if not site.is_weight and not site.quantizer.is_float:
            hook = functools.partial(record, site.name)
            hooks.append(site.quantizer.register_forward_pre_hook(hook))
    with probing(net, hooks):  # removes the hooks
        outputs = named_outputs(net(image))
    return outputs, codes


def graph_codes(model: Any, runtime: str) -> RunGraph:
    """Return a function that computes the outputs and codes of an ONNX model for an image.

    The function runs a copy of the model that also returns the inputs and outputs of all
    quantizers.
    """
    from onnx import ModelProto, TensorProto, ValueInfoProto, numpy_helper  # noqa: PLC0415  (an extra)

    copy = ModelProto()
    copy.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in copy.graph.initializer}
    quantizers = [node for node in copy.graph.node if node.op_type == "QuantizeLinear"]
    output_names = [output.name for output in model.graph.output]
    names = list(output_names)
    for node in quantizers:
        for name in (node.input[0], node.output[0]):
            if name != INPUT and name not in names:
                names.append(name)
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names[len(output_names) :])
    session = open_session(copy.SerializeToString(), runtime)

    def run(image: Tensor) -> tuple[Outputs, Codes]:
        arrays = session(names, image.numpy())
        values = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
        values[INPUT] = image
        codes = {}
        for node in quantizers:
            parameters = [numpy_helper.to_array(constants[name]) for name in node.input[1:]]
            step, zero_point = map(float, parameters)
            coordinates = values[node.input[0]] / step
            code_values = values[node.output[0]]
            if constants[node.input[2]].data_type == TensorProto.FLOAT8E4M3FN:
                code_values = code_values.view(torch.float8_e4m3fn)
            codes[node.name] = (coordinates, code_values.float() - zero_point)
        return {name: values[name] for name in output_names}, codes

    return run
