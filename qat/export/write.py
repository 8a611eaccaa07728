"""The operators of a net's quantizers and products, while torch traces it. What they add to the codes was worked out in `plan.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.export.codes import QuantizedTensor, StoredWeight, number
from qat.export.plan import Planner, added_code, whole_zero
from qat.functional.ste import view_along
from qat.model.frozen import FrozenActivation, FrozenWeight
from qat.spec import OUTPUT_ROLES
from qat.utils.probing import copied

# What leaves these goes into sums and norms, not into products.
_NUMBERS = frozenset(OUTPUT_ROLES) - {"qkv"}
# Metadata of an operator: the name of its quantizer.
SITE = "qat.site"
# The buffer of a weight that is stored in a narrower type afterwards.
CODES = "onnx_codes"


def unfused(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode, its float attentions in single operators: torch translates timm's fused one for four axes alone."""
    net = copied(net).eval()
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return net


def write_in_graph(
    net: nn.Module, stored: Mapping[str, StoredWeight], graph: Planner | Writer | TensorRT
) -> None:
    """Let quantizers give what products of a graph take; where what they give is in no product, its numbers."""

    def activation(grid: FrozenActivation, x: Tensor) -> Any:
        found = graph.activation(grid, x)
        return number(found) if grid.spec.role in _NUMBERS else found

    for name, module in net.named_modules():
        if isinstance(module, FrozenWeight):
            _prepare_weight(module, stored[name])
            weight = dataclasses.replace(stored[name], graph=graph)
            module.in_graph = lambda _, weight=weight: weight
        elif isinstance(module, FrozenActivation):
            module.in_graph = functools.partial(activation, module)


def _prepare_weight(weight: FrozenWeight, stored: StoredWeight) -> None:
    """Give a weight its buffers. A product takes a matrix transposed: stored like this, no operator has to do that."""
    scale = stored.scale.squeeze()  # a scalar where it is one for all rows
    zero = (
        None
        if stored.zero_point is None
        else stored.zero_point.expand(stored.scale.shape).reshape(scale.shape).contiguous()
    )
    codes = stored.codes.t().contiguous() if stored.codes.ndim == 2 else stored.codes
    for name, tensor in (
        (CODES, codes),
        ("onnx_zero", zero),
        ("onnx_factor", scale),
        ("onnx_constant", stored.constant),
    ):
        weight.register_buffer(name, tensor)


def _set_buffers(grid: Any, step: Tensor, added: Tensor, inverse: Tensor | None = None) -> None:
    """Of QuantizeLinear the scale, or else what its input is multiplied by, since runtimes take twice as long to divide; zero points."""
    for name, tensor in (
        ("step", step),
        ("inverse", inverse),
        ("added", added),
        ("zero", added + whole_zero(grid)),
    ):
        grid.register_buffer(f"onnx_{name}", tensor)
    # Numbers that Clip cuts off at, None where the type of the codes does.
    grid.onnx_bounds = (
        None if grid.qmax - grid.qmin == 255 else (grid.qmin * float(step), grid.qmax * float(step))
    )


class Writer(nn.Module):
    """Writes products down, in the order in which they were planned. Its buffers are the constants of the graph.

    Args:
        net: frozen; its quantizers of activations get their buffers.
        planner: has seen the net.
    """

    one: Tensor

    def __init__(self, net: nn.Module, planner: Planner) -> None:
        super().__init__()
        self.plans, self.position = nn.ModuleList(planner.plans), 0
        self.register_buffer("one", torch.ones(()))
        for grid in net.modules():
            if isinstance(grid, FrozenActivation):
                is_divided = grid in planner.divided
                # QuantizeLinear with one step size for each token takes twelve times as long as with one for the tensor.
                has_step = grid.scale.numel() == 1 and grid.zero_point is None and not is_divided
                inverse = None if has_step or is_divided else 1 / grid.scale
                step = grid.scale.reshape(()) if has_step else torch.ones(())
                _set_buffers(grid, step, added_code(grid, planner.cpu), inverse)

    def restart(self, *_: Any) -> None:
        """The net runs from its beginning."""
        self.position = 0

    def activation(self, grid: Any, x: Tensor) -> QuantizedTensor:
        """Place on the axis of codes, cut off, rounded to 8 bits.

        QuantizeLinear rounds and then adds its zero point, which is no more than what makes codes uint8 here: half to even, the rounding
        of a sum differs from the sum with a rounding where the zero point is odd, and after step sizes that are powers of two apart half
        of all values lie on such a tie.
        """
        u = x if grid.before is None else x + grid.before
        u = u if grid.onnx_inverse is None else u * view_along(grid.onnx_inverse, x.ndim, grid.axis)
        u = u if grid.zero_point is None else u + view_along(grid.zero_point, x.ndim, grid.axis)
        return QuantizedTensor(
            _quantize(u, grid), None, None, None, grid.name, grid.onnx_zero, self
        )

    def number(self, x: QuantizedTensor | StoredWeight) -> Tensor:
        """(codes + shift) * scale + after."""
        if isinstance(x, StoredWeight):
            return self._weight(x)
        plan = self._next()
        is_alone = plan.row is None and plan.scale.numel() == 1
        y = self._dequantized(x, plan.scale.squeeze() if is_alone else None)
        y = y if plan.row is None else y + plan.row
        y = y if is_alone else y * plan.scale
        return y if plan.constant is None else y + plan.constant

    def _weight(self, weight: StoredWeight) -> Tensor:
        """Codes, scale and constant; a matrix is stored transposed.

        All of it is constant, and Cast in place of DequantizeLinear lets onnxruntime work it out when it opens the file, so that a
        convolution keeps its blocked layout. onnxruntime may also make one kernel of a DequantizeLinear and its product with a float
        factor, and round that factor to 8 bits.
        """
        frozen: Any = weight.frozen
        codes, is_matrix = frozen.onnx_codes, weight.codes.ndim == 2
        y: Tensor = torch.onnx.ops.symbolic(
            "Cast", (codes,), {"to": 1}, dtype=torch.float32, shape=codes.shape
        )
        for name, constant in (
            ("sub", frozen.onnx_zero),
            ("mul", frozen.onnx_factor),
            ("add", frozen.onnx_constant),
        ):
            if constant is not None:
                is_row = is_matrix or constant.ndim == 0
                y = getattr(y, name)(
                    constant if is_row else constant.reshape(-1, *[1] * (y.ndim - 1))
                )
        return y.t() if is_matrix else y

    def product(self, a: QuantizedTensor, b: Any, bias: Tensor | None = None) -> Tensor:
        """As planned."""
        is_weight, plan = isinstance(b, StoredWeight), self._next()
        if not plan.on_codes:
            y = (
                F.linear(number(a), number(b), bias)
                if is_weight
                else torch.matmul(number(a), number(b))
            )
            return y if plan.scale is None else y * plan.scale
        # Two dimensions and a vector that is added would become one operator of float numbers.
        is_flat = is_weight and a.ndim == 2
        a = a.unsqueeze(1) if is_flat else a
        left = self._dequantized(a)
        right = (
            _dequantize(b.frozen.onnx_codes, plan.weight_scale, plan.weight_zero)
            if is_weight
            else self._dequantized(b)
        )
        y = torch.matmul(left, right)
        if plan.row is not None:
            y = y + plan.row
        if plan.sums is not None:
            y = y + torch.matmul(left, _dequantize(plan.ones, self.one)) * plan.sums
        if plan.columns is not None:
            y = y + right.sum(-2, keepdim=True) * plan.columns
        y = y.unflatten(-1, (plan.blocks, -1)) if plan.blocks else y
        if plan.scale is not None:
            y = y * (plan.scale if plan.columns_scale is None else plan.scale * plan.columns_scale)
        if plan.constant is not None:
            y = y + (plan.constant if plan.later is None else plan.constant * plan.later)
        if plan.left is not None:
            y = y + torch.matmul(plan.left, right) * plan.left_scale
        y = y.flatten(-2) if plan.blocks else y
        return y.squeeze(1) if is_flat else y

    def _next(self) -> Any:
        self.position += 1
        return self.plans[self.position - 1]

    def _dequantized(self, x: QuantizedTensor, scale: Tensor | None = None) -> Tensor:
        return _dequantize(x.codes, self.one if scale is None else scale, x.zero)


def require_int8(setting: str, net: nn.Module, stored: Mapping[str, StoredWeight]) -> None:
    """Raise `UsageError` unless every quantizer of a frozen net is one that integer kernels take as it is."""
    for name, grid in net.named_modules():
        form = stored.get(name)
        breaks = form is not None and not (form.zero_point is None and form.constant is None)
        if isinstance(grid, FrozenActivation):
            has_zero = grid.zero_point is not None and bool(grid.zero_point.any())
            breaks = grid.scale.numel() > 1 or has_zero or grid.after is not None or grid.qmax > 127
        if breaks:
            rule = "must have one scale, no zero point, half steps or offset, and codes within int8, as of quant=deploy_w8a8"
            raise UsageError(f"{setting}: {name} {rule}")


class TensorRT:
    """Writes quantizers down for compilers that place integer kernels themselves; what they give are numbers.

    Rules of TensorRT's explicit quantization (its developer guide, "Working with Quantized Types"): int8, zero points of 0, one scale for
    an activation, one for each output of a weight, and nothing between DequantizeLinear and the product.

    Args:
        net: frozen; its quantizers get their buffers.
        stored: its weights.

    Raises:
        UsageError: the net breaks the rules.
    """

    def __init__(self, net: nn.Module, stored: Mapping[str, StoredWeight]) -> None:
        require_int8("format.target=tensorrt", net, stored)
        for grid in net.modules():
            if isinstance(grid, FrozenActivation):
                _set_buffers(grid, grid.scale.reshape(()), torch.zeros((), dtype=torch.int8))

    def activation(self, grid: Any, x: Tensor) -> Tensor:
        """Rounded numbers."""
        codes = _quantize(x if grid.before is None else x + grid.before, grid)
        return _dequantize(codes, grid.onnx_step, grid.onnx_added)

    def number(self, weight: StoredWeight) -> Tensor:
        """Codes by their scale."""
        frozen: Any = weight.frozen
        is_matrix = weight.codes.ndim == 2
        y = _dequantize(frozen.onnx_codes, frozen.onnx_factor, axis=int(is_matrix))
        return y.t() if is_matrix else y


def _quantize(u: Tensor, grid: Any) -> Tensor:
    """QuantizeLinear with one step size, after what the type of the codes does not cut off."""
    u, added = u if grid.onnx_bounds is None else u.clamp(*grid.onnx_bounds), grid.onnx_added
    given, site = (u, grid.onnx_step, added), {SITE: grid.name}
    codes: Tensor = torch.onnx.ops.symbolic(
        "QuantizeLinear", given, {}, dtype=added.dtype, shape=u.shape, metadata_props=site
    )
    return codes


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1) -> Tensor:
    """DequantizeLinear, float32, with one scale or one for each place along an axis."""
    given = (codes, scale) if zero is None else (codes, scale, zero)
    along: dict[str, Any] = {"axis": axis} if scale.ndim else {}
    y: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", given, along, dtype=torch.float32, shape=codes.shape
    )
    return y
