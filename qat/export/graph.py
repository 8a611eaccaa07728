"""A frozen net as an ONNX graph of standard operators, in which every product of quantized tensors is one of codes of 8 bits."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.export.explicit import Explicit, check_rules
from qat.export.factors import Factor, WeightCodes, number
from qat.export.plan import Planner
from qat.export.simplify import divide_behind_maximum, narrow, simplify
from qat.export.stored_weights import TWO_BIT, WIDTHS, Stored, stored_form
from qat.export.write import CODES, SITE, Writer, prepare_activation, prepare_weight
from qat.model.convert import check_input, conversion_of
from qat.model.frozen import FrozenActivation, FrozenWeight, is_frozen

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from packaging.specifiers import SpecifierSet

INPUT, OUTPUT = "image", "logits"
DISTRIBUTION = "vit-qat"
# Gelu needs 20. A graph is written in this one, and its number raised where a stored type needs more: up to 25 operators got
# new types and attributes alone. From 21 on torch would write GroupNormalization, which onnxruntime runs in nine operators on a CPU.
LOWEST_OPSET = 20
LARGEST_CONSTANT = 4096
# Products on integers for onnxruntime and OpenVINO on CPUs; QuantizeLinear and DequantizeLinear for TensorRT.
TARGETS = ("cpu", "tensorrt")


def require_onnx() -> None:
    """Raise `UsageError` unless what writes and runs ONNX files is installed, and as new as the package asks for."""
    try:
        import onnx  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(f"format=onnx: {error.name} is not installed; pip install 'vit-qat[export]'") from error
    del onnx, onnxruntime
    for name, versions in _asked_for().items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            if not versions.contains(found, prereleases=True):
                raise UsageError(f"format=onnx: {name} {found} is too old; must be {versions}: pip install --upgrade '{name}{versions}'")


def _asked_for() -> dict[str, SpecifierSet]:
    """Versions of what the extras `export` and `openvino` bring; of nothing where the package lies in a folder that was never installed."""
    from packaging.requirements import Requirement  # noqa: PLC0415  (comes with onnxruntime)

    try:
        asked = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras = [{"extra": name} for name in ("export", "openvino")]
    return {one.name: one.specifier for one in asked if one.marker and any(map(one.marker.evaluate, extras))}


def check_size(frozen: nn.Module) -> None:
    """Raise `UsageError` unless a net takes images of any size, with scales that do not count its tokens."""
    one_size = "dynamic_size=true: this net takes images of one size; must be false, or a net with model.args.dynamic_img_size=true"
    if not getattr(frozen, "dynamic_img_size", True):
        raise UsageError(one_size)
    for name, module in frozen.named_modules():
        if not isinstance(module, FrozenActivation):
            continue
        if module.axis == -2 and module.scale.numel() > 1:
            raise UsageError(
                f"dynamic_size=true: {name} has a scale for each of {module.scale.numel()} positions; must be false,"
                " or a net of ptq.py with ptq.act_scales=tensor"
            )
        if module.spec.role == "image" and any(t is not None for t in (module.before, module.after)):
            raise UsageError(f"dynamic_size=true: {name} has an offset for each pixel; must be false, or a net with quant.offsets=false")
    done = conversion_of(frozen)
    if done is None:
        return
    channels, height, width = done.input_size
    try:
        check_input(frozen, (channels, 2 * height, 2 * width))
    except UsageError as error:
        raise UsageError(one_size) from error


@dataclass(frozen=True)
class OnnxSettings:
    """How a file is written.

    Attributes:
        dynamic_batch: any number of images.
        dynamic_size: images of any size.
        target: one of `TARGETS`.
        two_bit: `int4` stores weights of 2 bits in INT4, which OpenVINO reads, `int2` in INT2: half the bytes. Only for `cpu`.
        latency: images that are timed; 0 = none.
        threads: of a runtime while it is timed.
    """

    dynamic_batch: bool = True
    dynamic_size: bool = False
    target: str = "cpu"
    two_bit: str = "int4"
    latency: int = 20
    threads: int = 1


PLAIN = OnnxSettings()


def to_onnx(net: nn.Module, image: Tensor, settings: OnnxSettings = PLAIN) -> onnx.ModelProto:
    """Write a frozen net down in standard operators.

    Args:
        net: of `qat.freeze`.
        image: (1, C, H, W), of the size that the net takes.
        settings: how.

    Returns:
        The model: input `image` (B, C, H, W), output `logits` (B, classes), float32.

    Raises:
        UsageError: onnx is not installed or the target cannot have this net.
        RuntimeError: torch cannot export the net.
    """
    import onnx  # noqa: PLC0415  (an extra)

    if not is_frozen(net):
        raise UsageError("to_onnx: the net is not frozen; qat.freeze(net) does that")
    net = copy.deepcopy(net).eval()
    lowest = WIDTHS["INT8"] if settings.target == "tensorrt" else TWO_BIT[settings.two_bit]
    forms = {name: stored_form(module, lowest) for name, module in net.named_modules() if isinstance(module, FrozenWeight)}
    for name, module in net.named_modules():
        if isinstance(module, FrozenWeight):
            prepare_weight(module, forms[name])
    if settings.target == "tensorrt":
        check_rules(net, forms)
        explicit = Explicit()
        explicit.prepare(net)
        _give_forms(net, forms, explicit)
        model = export_graph(net, image, settings)
    else:
        model = _on_integers(net, image, forms, settings)
    simplify(model)
    narrow(model, forms)
    _raise_opset(model, max([LOWEST_OPSET, *(form.opset for form in forms.values())]))
    onnx.checker.check_model(model, full_check=True)
    return model


def _on_integers(net: nn.Module, image: Tensor, forms: Mapping[str, Stored], settings: OnnxSettings) -> onnx.ModelProto:
    planner = Planner(net)
    _give_forms(net, forms, planner)
    with torch.no_grad():
        net(image)
    for module in net.modules():
        if isinstance(module, FrozenActivation):
            prepare_activation(module, is_divided=module in planner.in_codes)
    writer = net.onnx = Writer(planner.plans)
    _give_forms(net, forms, writer)
    with net.register_forward_pre_hook(writer.restart):
        model = export_graph(net, image, settings)
    divide_behind_maximum(model)
    return model


_Graph = Planner | Writer | Explicit


def _give_forms(net: nn.Module, forms: Mapping[str, Stored], graph: _Graph) -> None:
    """Quantizers give factors of products; where what they give is in no product, its numbers."""
    for name, module in net.named_modules():
        if isinstance(module, FrozenWeight):
            module.form = functools.partial(_weight, graph, module, forms[name])
        elif isinstance(module, FrozenActivation):
            module.form = functools.partial(_activation, graph, module)


def _weight(graph: _Graph, weight: FrozenWeight, form: Stored, _: None) -> WeightCodes | Tensor:
    return graph.weight(weight, form)


def _activation(graph: _Graph, grid: FrozenActivation, x: Tensor) -> Factor | Tensor:
    found = graph.activation(grid, x)
    return found if grid.is_factor else number(found)


def _raise_opset(model: onnx.ModelProto, opset: int) -> None:
    from onnx import helper  # noqa: PLC0415  (an extra)

    for entry in model.opset_import:
        entry.version = entry.version if entry.domain else opset
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))


def export_graph(net: nn.Module, image: Tensor, settings: OnnxSettings = PLAIN) -> onnx.ModelProto:
    """Any net in ONNX, by torch's exporter, in opset `LOWEST_OPSET`; arguments as of `to_onnx`.

    Raises:
        UsageError: torch cannot export it with these sizes.
    """
    from onnxscript import optimizer  # noqa: PLC0415  (an extra)

    # An example of one image would be taken for a net of one image.
    images = image.expand(2, -1, -1, -1).contiguous() if settings.dynamic_batch else image
    free = {0: torch.export.Dim("batch")} if settings.dynamic_batch else {}
    free |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} if settings.dynamic_size else {}
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnx_ir", "onnxscript"))}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                net,
                (images,),
                dynamo=True,
                opset_version=LOWEST_OPSET,
                dynamic_shapes=(free,) if free else None,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
                optimize=False,
            )
        if program is not None:
            # Constants that grow, as an outer product of two vectors, are for the runtime to work out when it opens the file.
            optimizer.optimize_ir(program.model, output_size_limit=LARGEST_CONSTANT, should_fold=_should_fold)
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UsageError(f"format=onnx: torch cannot export this net: {' '.join(str(cause).split())[:300]}") from error
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
    if program is None:
        raise UsageError("format=onnx: torch cannot export this net, and does not say why")
    model = program.model_proto
    _strip(model)
    return model


def _should_fold(node: onnx_ir.Node) -> bool | None:
    """False of the codes of a weight, which would be stored as float numbers; None = the optimizer decides."""
    return False if any(value is not None and (value.name or "").endswith(CODES) for value in node.inputs) else None


def _strip(model: onnx.ModelProto) -> None:
    """Name quantizers, and take out what torch notes of its own source code: in a small net more bytes than the weights."""
    graph = model.graph
    for node in graph.node:
        site = next((entry.value for entry in node.metadata_props if entry.key == SITE), None)
        node.name = node.name if site is None else site
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    del graph.value_info[:]
