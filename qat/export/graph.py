"""A frozen net as an ONNX graph of standard operators: QuantizeLinear and DequantizeLinear around every product."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.export.stored_weights import WIDTHS, Stored, needed_opset, stored_form
from qat.functional.packing import pack_codes
from qat.functional.ste import view_along
from qat.model.frozen import FrozenActivation, FrozenWeight, is_frozen
from qat.nn import QkrAttention
from qat.nn.conv import QuantConv2d
from qat.nn.linear import QuantLinear

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT = "image", "logits"
# LayerNormalization needs 17, QuantizeLinear with an axis 13, Gelu 20.
LOWEST_OPSET, HIGHEST_OPSET = 20, 28
_SITE = "qat.site"
# Behind the name of a quantizer whose operator gets what is in the unit of codes already.
IN_CODES = "/codes"
_CODES, _ZERO, _GRID = "onnx_codes", "onnx_zero_point", "onnx_scale"


def require_onnx() -> None:
    """Raise `UsageError` unless what writes and runs ONNX files is installed."""
    try:
        import onnx  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(f"format=onnx: {error.name} is not installed; pip install 'qat[export]'") from error
    del onnx, onnxruntime


def check_size(frozen: nn.Module) -> None:
    """Raise `UsageError` unless a net takes images of any size, with scales that do not count its tokens."""
    if not getattr(frozen, "dynamic_img_size", True):
        raise UsageError(
            "dynamic_size=true: this net takes images of one size; must be false, or a net with model.args.dynamic_img_size=true"
        )
    for name, module in frozen.named_modules():
        if not isinstance(module, FrozenActivation):
            continue
        if module.axis is not None and module.scale.numel() > 1 and module.spec.role != "image":
            raise UsageError(
                f"dynamic_size=true: {name} has a scale for each of {module.scale.numel()} positions; must be false,"
                " or a net of ptq.py with ptq.act_scales=tensor"
            )
        if module.spec.role == "image" and any(t is not None for t in (module.before, module.after)):
            raise UsageError(f"dynamic_size=true: {name} has an offset for each pixel; must be false, or a net with quant.offsets=false")


class FreeDimensions(NamedTuple):
    """Which sizes of a file's input are free.

    Attributes:
        batch: the number of images.
        size: height and width.
    """

    batch: bool = True
    size: bool = False


ANY_BATCH = FreeDimensions()


def to_onnx(
    net: nn.Module, image: Tensor, *, opset: int | None = None, shape: FreeDimensions = ANY_BATCH, two_bit: str = "int2"
) -> onnx.ModelProto:
    """Write a frozen net down in standard operators.

    Args:
        net: of `qat.freeze`.
        image: (1, C, H, W), of the size that the net takes.
        opset: None = the lowest that has all types.
        shape: which sizes of its input are free.
        two_bit: see `stored_form`.

    Returns:
        The model: input `image` (B, C, H, W), output `logits` (B, classes), float32.

    Raises:
        UsageError: onnx is not installed, or the opset is too low or unknown.
        RuntimeError: torch cannot export the net.
    """
    require_onnx()
    import onnx  # noqa: PLC0415  (an extra)

    if not is_frozen(net):
        raise UsageError("to_onnx: the net is not frozen; qat.freeze(net) does that")
    net = copy.deepcopy(net).eval()
    alone = _alone(net)
    forms = {name: stored_form(module, two_bit) for name, module in net.named_modules() if isinstance(module, FrozenWeight)}
    opset = needed_opset(forms, opset, LOWEST_OPSET)
    if opset > HIGHEST_OPSET:
        raise UsageError(f"opset={opset}: must be an integer from {LOWEST_OPSET} to {HIGHEST_OPSET}")
    for name, module in net.named_modules():
        if isinstance(module, FrozenWeight):
            _give_weight_form(module, forms[name], apart=id(module) in alone and forms[name].constant is None)
        elif isinstance(module, FrozenActivation):
            _give_activation_form(module)
    model = export_graph(net, image, opset, shape)
    _narrow(model, forms)
    onnx.checker.check_model(model, full_check=True)
    return model


def _alone(net: nn.Module) -> set[int]:
    """Weights that must not be all that stands in front of a product.

    Onnxruntime makes one kernel of a weight's DequantizeLinear and its product. Where the other factor is no plain quantized tensor that
    kernel rounds it to 8 bits, unless a session option forbids it; and it refuses one with a scale for each token beside 8-bit weights, and
    codes of 2 bits with a zero point.
    """
    found = {id(q) for m in net.modules() if isinstance(m, QkrAttention) for q in (m.qk_quantizer, *m.v.children())}
    for module in net.modules():
        if isinstance(module, QuantLinear | QuantConv2d) and isinstance(module.weight_quantizer, FrozenWeight):
            grid = module.input_quantizer
            plain = isinstance(grid, FrozenActivation) and grid.after is None and not grid.grid().is_half_step
            bits = module.weight_quantizer.spec.bits
            if not plain or bits < WIDTHS["INT4"] or (grid.axis is not None and bits > WIDTHS["INT4"]):
                found.add(id(module.weight_quantizer))
    return found


def _give_weight_form(weight: Any, form: Stored, *, apart: bool) -> None:
    """A product takes the weight the other way round: stored like this, nothing has to be turned when the file is run.

    Args:
        weight: gets buffers for the graph.
        form: how it is stored.
        apart: multiply by the scale in an operator of its own.
    """
    turned = form.codes.ndim == 2
    weight.register_buffer(_CODES, form.codes.t().contiguous() if turned else form.codes)
    axis = None if form.scale.numel() == 1 else 1 if turned else 0
    rows = [-1] if turned else [-1, *[1] * (form.codes.ndim - 1)]
    scale = form.scale if axis is not None else form.scale.reshape(())
    weight.register_buffer(_GRID, torch.ones_like(scale) if apart else scale)
    weight.register_buffer(_ZERO, None if form.zero_point is None else form.zero_point.reshape(scale.shape))
    weight.register_buffer("onnx_factor", (scale if axis is None else scale.reshape(rows)) if apart else None)
    weight.register_buffer("onnx_constant", None if form.constant is None else form.constant.reshape(rows))
    weight.form = functools.partial(_weight_form, weight, axis, turned)


def _weight_form(weight: Any, axis: int | None, turned: bool, _: Tensor | None) -> Tensor:  # noqa: FBT001
    tensors = [t for t in (weight.onnx_codes, weight.onnx_scale, weight.onnx_zero_point) if t is not None]
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    y = torch.onnx.ops.symbolic("DequantizeLinear", tensors, attributes, dtype=torch.float32, shape=weight.onnx_codes.shape)
    y = y if weight.onnx_factor is None else y * weight.onnx_factor
    y = y if weight.onnx_constant is None else y + weight.onnx_constant
    return y.t() if turned else y


def _give_activation_form(grid: Any) -> None:
    """QuantizeLinear rounds and then adds the zero point; we round the sum. Half to even, these differ where the zero point is odd.

    Behind quantizers whose steps are powers of two apart half of all values lie on such a tie. There the sum is made in front. So it is
    where a tensor has several scales: what onnxruntime makes of an operator between two quantizers, unless a session option forbids it,
    takes one, and where values lie half a step beside those of integers, which is added behind.
    """
    kind = torch.int8 if grid.qmin < 0 else torch.uint8
    scale = grid.scale.reshape(()) if grid.axis is None else grid.scale
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.reshape(scale.shape)
    whole = zero.ceil()
    grid.register_buffer(_GRID, scale.clone())
    grid.register_buffer(_ZERO, whole.to(kind))
    grid.register_buffer("onnx_rest", (whole - zero) * scale if grid.grid().is_half_step else None)
    before = (grid.axis is not None and grid.after is None) or bool((zero % 2 != 0).any())
    grid.register_buffer("onnx_one", torch.ones(()) if before else None)
    grid.register_buffer("onnx_none", torch.zeros((), dtype=kind) if before else None)
    grid.form = functools.partial(_activation_form, grid, kind)


def _activation_form(grid: Any, kind: torch.dtype, x: Tensor) -> Tensor:
    """Saturating at the codes of 8 bits by itself, at fewer by a Clip of the codes."""
    along: dict[str, Any] = {} if grid.axis is None else {"axis": grid.axis % x.ndim}
    shifted = x if grid.before is None else x + grid.before
    operands, site = (grid.onnx_scale, grid.onnx_zero_point), {_SITE: grid.name + (IN_CODES if grid.onnx_one is not None else "")}
    if grid.onnx_one is not None:
        u = shifted / view_along(grid.scale, x.ndim, grid.axis)
        u = u if grid.zero_point is None else u + view_along(grid.zero_point, x.ndim, grid.axis)
        given, attributes = (u, grid.onnx_one, grid.onnx_none), {}
    else:
        given, attributes = (shifted, *operands), along
    codes = torch.onnx.ops.symbolic("QuantizeLinear", given, attributes, dtype=kind, shape=x.shape, metadata_props=site)
    info = torch.iinfo(kind)
    if (grid.qmin, grid.qmax) != (info.min, info.max):
        codes = codes.clamp(grid.qmin, grid.qmax)
    y = torch.onnx.ops.symbolic("DequantizeLinear", (codes, *operands), along, dtype=torch.float32, shape=x.shape)
    y = y if grid.onnx_rest is None else y + view_along(grid.onnx_rest.reshape(-1), x.ndim, grid.axis)
    return y if grid.after is None else y + grid.after


def export_graph(net: nn.Module, image: Tensor, opset: int, shape: FreeDimensions) -> onnx.ModelProto:
    """Any net in ONNX, by torch's exporter; arguments as of `to_onnx`.

    Raises:
        UsageError: torch cannot export it with these sizes.
    """
    # An example of one image would be taken for a net of one image.
    images = image.expand(2, -1, -1, -1).contiguous() if shape.batch else image
    free = {0: torch.export.Dim("batch")} if shape.batch else {}
    free |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} if shape.size else {}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                net,
                (images,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(free,) if free else None,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UsageError(f"format=onnx: torch cannot export this net: {' '.join(str(cause).split())[:300]}") from error
    finally:
        logger.setLevel(level)
    if program is None:
        raise UsageError("format=onnx: torch cannot export this net, and does not say why")
    model = program.model_proto
    _strip(model)
    return model


def _narrow(model: onnx.ModelProto, forms: Mapping[str, Stored]) -> None:
    """Give codes and zero points of weights the types that they fit; torch writes bytes."""
    from onnx import TensorProto  # noqa: PLC0415

    for tensor in model.graph.initializer:
        site, _, last = tensor.name.rpartition(".")
        if last not in {_CODES, _ZERO} or site not in forms:
            continue
        kind = forms[site].kind
        bytes_of = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.int8 if kind.startswith("INT") else torch.uint8)
        tensor.raw_data = pack_codes(bytes_of, WIDTHS[kind]).numpy().tobytes()
        tensor.data_type = getattr(TensorProto, kind)


def _strip(model: onnx.ModelProto) -> None:
    """Name quantizers, and take out what torch notes of its own source code: in a small net more bytes than the weights."""
    graph = model.graph
    for node in graph.node:
        site = next((entry.value for entry in node.metadata_props if entry.key == _SITE), None)
        node.name = node.name if site is None else site
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    del graph.value_info[:]
