"""Write a model's quantizers and products as ONNX operators, while torch traces the model.

`Writer` takes the constants of the products from `plan.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from qat.errors import UsageError
from qat.export.codes import QuantizedTensor, StoredWeight, dequantize
from qat.export.plan import Planner, code_offset, integer_zero_point
from qat.functional.ste import view_along
from qat.model.frozen import FrozenActivation, FrozenFp8Activation, FrozenWeight
from qat.model.sites import iter_quantizers
from qat.spec import OUTPUT_ROLES
from qat.utils.probing import copy_net
from qat.utils.validate import FP8

# Sums, norms and softmaxes use the outputs of these quantizers; products do not.
_FLOAT_ROLES = frozenset(OUTPUT_ROLES) - {"qkv"}
# Metadata key of an operator, for the name of its quantizer.
SITE = "qat.site"
# Name of the buffer for a weight's codes, which `narrow_weights` may store in a narrower type.
CODES = "onnx_codes"


def call_name(quantizer_name: str, used_names: Container[str]) -> str:
    """The quantizer's name; NAME#2, NAME#3 ... for its later calls in the same forward."""
    name = quantizer_name
    call_index = 1
    while name in used_names:
        call_index += 1
        name = f"{quantizer_name}#{call_index}"
    return name


def copy_unfused(net: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, in which timm's attentions use separate operators.

    Torch can export timm's fused attention only for tensors of four dimensions.
    """
    net = copy_net(net).eval()
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return net


def write_in_graph(
    net: nn.Module, stored: Mapping[str, StoredWeight], graph: Planner | Writer | TensorRT
) -> None:
    """Make quantizers return results of `graph`: operands of products, or else numbers."""

    def activation(quantizer: Any, x: Tensor) -> Any:
        quantized = graph.activation(quantizer, x)
        return dequantize(quantized) if quantizer.spec.role in _FLOAT_ROLES else quantized

    for name, module in net.named_modules():
        if isinstance(module, FrozenWeight):
            _register_weight(module, stored[name])
            weight = dataclasses.replace(stored[name], graph=graph)
            module.in_graph = lambda _, weight=weight: weight
        elif isinstance(module, FrozenActivation | FrozenFp8Activation):
            module.in_graph = functools.partial(activation, module)


def _register_weight(weight: FrozenWeight, stored: StoredWeight) -> None:
    """Register the buffers of a weight. A matrix is stored transposed, as products need it."""
    codes = stored.codes
    if codes.ndim == 2:
        codes = codes.t().contiguous()
    scale = stored.scale.squeeze()  # a scalar if all rows have one scale
    zero = stored.zero_point
    if zero is not None:
        zero = zero.expand(stored.scale.shape).reshape(scale.shape).contiguous()
    weight.register_buffer(CODES, codes)
    weight.register_buffer("onnx_zero", zero)
    weight.register_buffer("onnx_factor", scale)
    weight.register_buffer("onnx_constant", stored.constant)


def _register_activation(
    quantizer: Any, step: Tensor, offset: Tensor, input_factor: Tensor | None = None
) -> None:
    """Register the buffers of an activation quantizer.

    Args:
        quantizer: the quantizer.
        step: scale of QuantizeLinear, ().
        offset: number that is added to codes so that they fit 8 bits, see `code_offset`.
        input_factor: (n,), factors of the input, because a division by scales would take
            runtimes twice as long. None = 1.
    """
    quantizer.register_buffer("onnx_step", step)
    quantizer.register_buffer("onnx_inverse", input_factor)
    quantizer.register_buffer("onnx_added", offset)
    quantizer.register_buffer("onnx_zero", offset + integer_zero_point(quantizer))
    quantizer.onnx_bounds = None
    if quantizer.qmax - quantizer.qmin != 255:
        # The grid has fewer values than the 8-bit type, so Clip needs the ends of the grid.
        quantizer.onnx_bounds = (quantizer.qmin * float(step), quantizer.qmax * float(step))


class Writer(nn.Module):
    """Writes products in the order in which they were planned; its buffers become constants.

    Args:
        net: a frozen model; its activation quantizers get buffers.
        planner: planner that has planned this model's products.
    """

    one: Tensor

    def __init__(self, net: nn.Module, planner: Planner) -> None:
        super().__init__()
        self.plans = nn.ModuleList(planner.plans)
        self.position = 0
        self.register_buffer("one", torch.ones(()))
        for quantizer in net.modules():
            if not isinstance(quantizer, FrozenActivation):
                continue
            is_predivided = quantizer in planner.predivided
            # QuantizeLinear takes twelve times as long with a step size per token as with one step
            # size, and a zero point must be added before it rounds. In both cases, `activation`
            # multiplies by the inverse scales instead, and the step size is 1.
            has_one_scale = quantizer.scale.numel() == 1
            has_step = has_one_scale and quantizer.zero_point is None and not is_predivided
            step = quantizer.scale.reshape(()) if has_step else torch.ones(())
            input_factor = None if has_step or is_predivided else 1 / quantizer.scale
            _register_activation(quantizer, step, code_offset(quantizer, planner.cpu), input_factor)

    def restart(self, *_: Any) -> None:
        """Return to the first plan before the model runs again."""
        self.position = 0

    def activation(self, quantizer: Any, x: Tensor) -> QuantizedTensor:
        """Write the quantization of an activation, and return its codes.

        QuantizeLinear rounds and then adds its zero point, which here only makes codes fit 8
        bits. The zero point of the grid is added before the rounding, because adding an odd number
        after it would round ties the other way (half to even). If the input is already on a grid
        with half the step size, half of its values are ties.
        """
        u = x
        if quantizer.before is not None:
            u = u + quantizer.before
        if quantizer.onnx_inverse is not None:
            u = u * view_along(quantizer.onnx_inverse, x.ndim, quantizer.axis)
        if quantizer.zero_point is not None:
            u = u + view_along(quantizer.zero_point, x.ndim, quantizer.axis)
        codes = _quantize(u, quantizer)
        return QuantizedTensor(codes, None, None, None, quantizer.name, quantizer.onnx_zero, self)

    def dequantize(self, x: QuantizedTensor | StoredWeight) -> Tensor:
        """Write a dequantization; of activations: (codes + row) * scale + constant, see `Plan`."""
        if isinstance(x, StoredWeight):
            return self._dequantize_weight(x)
        plan = self._next_plan()
        if plan.row is None and plan.scale.numel() == 1:
            y = self._dequantize_codes(x, plan.scale.squeeze())
        else:
            y = self._dequantize_codes(x)
            if plan.row is not None:
                y = y + plan.row
            y = y * plan.scale
        if plan.constant is not None:
            y = y + plan.constant
        return y

    def _dequantize_weight(self, weight: StoredWeight) -> Tensor:
        """Write the dequantization of a weight.

        All operators here have constant inputs. With Cast in place of DequantizeLinear, onnxruntime
        computes the weight when it opens the file, so that a convolution keeps its blocked layout.
        DequantizeLinear could also be fused with a product whose other factor is float, and
        onnxruntime would round this factor to 8 bits.
        """
        frozen: Any = weight.frozen
        codes = frozen.onnx_codes
        y: Tensor = torch.onnx.ops.symbolic(
            "Cast", (codes,), {"to": 1}, dtype=torch.float32, shape=codes.shape
        )
        if frozen.onnx_zero is not None:
            y = y - _broadcast_over_outputs(frozen.onnx_zero, y)
        y = y * _broadcast_over_outputs(frozen.onnx_factor, y)
        if frozen.onnx_constant is not None:
            y = y + _broadcast_over_outputs(frozen.onnx_constant, y)
        return y.t() if y.ndim == 2 else y

    def product(self, a: QuantizedTensor, b: Any, bias: Tensor | None = None) -> Tensor:
        """Compute a product by the operators of its plan."""
        plan = self._next_plan()
        is_weight = isinstance(b, StoredWeight)
        if not plan.on_codes:
            left = dequantize(a)
            right = dequantize(b)
            y = F.linear(left, right, bias) if is_weight else torch.matmul(left, right)
            return y if plan.scale is None else y * plan.scale
        # Runtimes merge a 2-D product and the vector added to it into one float operator, so add a
        # dimension.
        is_flat = is_weight and a.ndim == 2
        if is_flat:
            a = a.unsqueeze(1)
        left = self._dequantize_codes(a)
        right = self._weight_codes(b, plan) if is_weight else self._dequantize_codes(b)
        y = self._product_of_codes(plan, left, right)
        return y.squeeze(1) if is_flat else y

    def _product_of_codes(self, plan: Any, left: Tensor, right: Tensor) -> Tensor:
        """Write the product of two factors, with all constants of its plan."""
        y = torch.matmul(left, right)
        if plan.row is not None:
            y = y + plan.row
        if plan.sums is not None:
            row_sums = torch.matmul(left, _dequantize(plan.ones, self.one))
            y = y + row_sums * plan.sums
        if plan.columns is not None:
            column_sums = right.sum(-2, keepdim=True)
            y = y + column_sums * plan.columns
        if plan.blocks:
            y = y.unflatten(-1, (plan.blocks, -1))
        scale = plan.scale
        if plan.columns_scale is not None:
            scale = scale * plan.columns_scale
        if scale is not None:
            y = y * scale
        constant = plan.constant
        if plan.constant_factor is not None and constant is not None:
            constant = constant * plan.constant_factor
        if constant is not None:
            y = y + constant
        if plan.left is not None:
            y = y + torch.matmul(plan.left, right) * plan.left_scale
        if plan.blocks:
            y = y.flatten(-2)
        return y

    def _next_plan(self) -> Any:
        plan = self.plans[self.position]
        self.position += 1
        return plan

    def _weight_codes(self, weight: StoredWeight, plan: Any) -> Tensor:
        frozen: Any = weight.frozen
        return _dequantize(frozen.onnx_codes, plan.weight_scale, plan.weight_zero)

    def _dequantize_codes(self, x: QuantizedTensor, scale: Tensor | None = None) -> Tensor:
        return _dequantize(x.codes, self.one if scale is None else scale, x.zero)


def _broadcast_over_outputs(t: Tensor, weight: Tensor) -> Tensor:
    """View one number, or one number per output, so that it broadcasts with a weight.

    Outputs are the last dimension of a matrix, which is stored transposed, and the first dimension
    of any other weight.
    """
    if t.ndim == 0 or weight.ndim == 2:
        return t
    return t.reshape(-1, *[1] * (weight.ndim - 1))


def require_int8(setting: str, net: nn.Module, stored: Mapping[str, StoredWeight]) -> None:
    """Raise `UsageError` if integer kernels do not support a uniform quantizer of a model."""
    for name, module in net.named_modules():
        is_int8 = True
        if isinstance(module, FrozenActivation):
            is_int8 = _is_int8(module)
        elif name in stored:
            is_int8 = stored[name].zero_point is None and stored[name].constant is None
        if not is_int8:
            raise UsageError(
                f"{setting}: {name} must have one scale (a weight: one per output), no zero point, "
                "half steps or offset, and codes within int8, as with quant=deploy_w8a8"
            )


def _is_int8(quantizer: FrozenActivation) -> bool:
    has_zero_point = quantizer.zero_point is not None and bool(quantizer.zero_point.any())
    if has_zero_point or quantizer.after is not None:
        return False
    return quantizer.scale.numel() == 1 and quantizer.qmax <= 127


class TensorRT:
    """Writes quantizers for TensorRT, which finds the 8-bit products itself.

    TensorRT's explicit quantization has these rules (its developer guide, "Working with Quantized
    Types"): codes are all int8 or all E4M3, zero points are 0, an activation has one scale, a
    weight has one scale per output, and nothing is between DequantizeLinear and the product.

    Args:
        net: a frozen model; its quantizers get buffers.
        stored: the weights of the model.

    Raises:
        UsageError: the model breaks the rules.
    """

    def __init__(self, net: nn.Module, stored: Mapping[str, StoredWeight]) -> None:
        require_int8("format.target=tensorrt", net, stored)
        name_by_is_fp8 = {}
        for site in iter_quantizers(net):
            if not site.quantizer.is_float:
                is_fp8 = site.quantizer.spec.quantizer in FP8
                name_by_is_fp8[is_fp8] = site.name
        if len(name_by_is_fp8) == 2:
            raise UsageError(
                f"format.target=tensorrt: {name_by_is_fp8[True]} has 8-bit floats and "
                f"{name_by_is_fp8[False]} integers; must be floats or integers in the whole model"
            )
        for quantizer in net.modules():
            if isinstance(quantizer, FrozenActivation):
                offset = torch.zeros((), dtype=torch.int8)
                _register_activation(quantizer, quantizer.scale.reshape(()), offset)
            elif isinstance(quantizer, FrozenFp8Activation):
                step: Any = quantizer.quantizer.scale
                quantizer.register_buffer("onnx_step", step.detach().reshape(()))
                quantizer.register_buffer("onnx_added", torch.zeros((), dtype=torch.float8_e4m3fn))

    def activation(self, quantizer: Any, x: Tensor) -> Tensor:
        """Quantize and dequantize an activation."""
        if quantizer.before is not None:
            x = x + quantizer.before
        codes = _quantize(x, quantizer)
        return _dequantize(codes, quantizer.onnx_step, quantizer.onnx_added)

    def dequantize(self, weight: StoredWeight) -> Tensor:
        """Dequantize a weight."""
        frozen: Any = weight.frozen
        is_matrix = weight.codes.ndim == 2
        y = _dequantize(frozen.onnx_codes, frozen.onnx_factor, axis=int(is_matrix))
        return y.t() if is_matrix else y


def compute_in_half(net: nn.Module) -> None:
    """Convert a model for TensorRT from float32 to float16, except the image and the outputs.

    Raises:
        UsageError: the step size of an activation is below the smallest normal float16.
    """
    min_normal = torch.finfo(torch.float16).tiny
    for name, buffer in net.named_buffers():
        if name.endswith("onnx_step") and buffer < min_normal:
            raise UsageError(
                f"format.precision=fp16: the step size of {name.removesuffix('.onnx_step')} "
                f"({float(buffer):.1e}) is below the smallest normal float16 ({min_normal:.1e}); "
                "use format.precision=fp32"
            )
    net._apply(lambda t: t.half() if t.dtype == torch.float32 else t)
    net.register_forward_pre_hook(lambda _, args: (args[0].half(),))
    net.register_forward_hook(lambda _, args, outputs: tree_map(Tensor.float, outputs))


def _quantize(u: Tensor, quantizer: Any) -> Tensor:
    """Write QuantizeLinear with one step size, after a Clip to the ends of the grid if needed."""
    if quantizer.onnx_bounds is not None:
        u = u.clamp(*quantizer.onnx_bounds)
    codes: Tensor = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (u, quantizer.onnx_step, quantizer.onnx_added),
        {},
        dtype=quantizer.onnx_added.dtype,
        shape=u.shape,
        metadata_props={SITE: quantizer.name},
    )
    return codes


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1) -> Tensor:
    """Write a DequantizeLinear whose output has the dtype of `scale`.

    There is one scale, or one for each position along `axis`.
    """
    inputs = (codes, scale) if zero is None else (codes, scale, zero)
    attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
    y: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, attributes, dtype=scale.dtype, shape=codes.shape
    )
    return y
