"""The operators of a net's quantizers and products, while torch traces it. What they add to the codes was worked out in `plan.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.export.factors import Factor, WeightCodes, number
from qat.export.plan import Plan, added_code, code_type, whole_zero
from qat.export.stored_weights import Stored
from qat.functional.ste import view_along
from qat.model.frozen import FrozenActivation, FrozenWeight

_TENSORS = tuple(one.name for one in dataclasses.fields(Plan) if one.name not in {"on_codes", "blocks", "size"})
SITE = "qat.site"
# Buffers of a weight: codes, the scale, what is added to a row.
CODES, FACTOR, CONSTANT = "onnx_codes", "onnx_factor", "onnx_constant"
# Of activations: the scale of QuantizeLinear; 1 / scale where that cannot have it, since runtimes take twice as long to divide; what
# QuantizeLinear adds to codes. Of both: what DequantizeLinear takes from codes.
STEP, INVERSE, ADDED, ZERO = "onnx_step", "onnx_inverse", "onnx_added", "onnx_zero"
# Numbers that Clip cuts off at, None where the type of the codes does.
BOUNDS = "onnx_bounds"


def prepare_weight(weight: FrozenWeight, form: Stored) -> None:
    """Give a weight its buffers. A product takes a matrix the other way round: stored like this, nothing has to be turned."""
    turned = form.codes.ndim == 2
    scale = form.scale.reshape(()) if form.scale.numel() == 1 else form.scale
    zero = None if form.zero_point is None else form.zero_point.expand(form.scale.shape).reshape(scale.shape).contiguous()
    buffers = {
        CODES: form.codes.t().contiguous() if turned else form.codes,
        ZERO: zero,
        FACTOR: scale,
        CONSTANT: form.constant,
    }
    for name, tensor in buffers.items():
        weight.register_buffer(name, tensor)


def prepare_activation(grid: FrozenActivation, *, is_divided: bool) -> None:
    """Give a quantizer of activations its buffers.

    Args:
        grid: which.
        is_divided: its input arrives divided by its steps.
    """
    kind, added = code_type(grid), added_code(grid)
    # QuantizeLinear with one step for each token takes twelve times as long as with one for the tensor.
    has_step = grid.scale.numel() == 1 and grid.zero_point is None and not is_divided
    grid.register_buffer(STEP, grid.scale.reshape(()) if has_step else torch.ones(()))
    grid.register_buffer(INVERSE, None if has_step or is_divided else 1 / grid.scale)
    step = float(grid.scale) if has_step else 1.0
    setattr(grid, BOUNDS, None if grid.qmax - grid.qmin == 255 else (grid.qmin * step, grid.qmax * step))
    grid.register_buffer(ADDED, torch.tensor(added, dtype=kind))
    grid.register_buffer(ZERO, torch.tensor(whole_zero(grid) + added, dtype=kind))


class Writer(nn.Module):
    """Writes products down, in the order in which they were planned. Its buffers are the constants of the graph.

    Args:
        plans: of `Planner`.
    """

    one: Tensor

    def __init__(self, plans: Sequence[Plan]) -> None:
        super().__init__()
        self.plans, self.position = plans, 0
        self.register_buffer("one", torch.ones(()))
        for index, plan in enumerate(plans):
            for name in _TENSORS:
                self.register_buffer(f"{name}_{index}", getattr(plan, name))
            if plan.sums is not None and not hasattr(self, f"ones_{plan.size}"):
                self.register_buffer(f"ones_{plan.size}", torch.ones(plan.size, 1, dtype=torch.int8))

    def restart(self, *_: Any) -> None:
        """The net runs from its beginning."""
        self.position = 0

    def activation(self, grid: FrozenActivation, x: Tensor) -> Factor:
        """Place on the axis of codes, cut off, rounded to 8 bits.

        QuantizeLinear rounds and then adds its zero point, which is no more than what makes codes uint8 here: half to even, the rounding
        of a sum differs from the sum with a rounding where the zero point is odd, and behind steps that are powers of two apart half of
        all values lie on such a tie.
        """
        step, inverse, added, bounds = (getattr(grid, name) for name in (STEP, INVERSE, ADDED, BOUNDS))
        u = x if grid.before is None else x + grid.before
        u = u if inverse is None else u * view_along(inverse, x.ndim, grid.axis)
        u = u if grid.zero_point is None else u + view_along(grid.zero_point, x.ndim, grid.axis)
        u = u if bounds is None else u.clamp(*bounds)
        codes = quantize(u, step, added, grid.name)
        return Factor(codes, None, None, 0, grid.name, zero=getattr(grid, ZERO), graph=self)  # type: ignore[arg-type]

    def weight(self, frozen: FrozenWeight, form: Stored) -> WeightCodes:
        """Of a frozen weight."""
        return WeightCodes(frozen, form, self)

    def number(self, x: Factor) -> Tensor:
        """(codes + shift) * scale + after."""
        plan = self._next()
        alone = plan["row"] is None and plan["scale"].numel() == 1
        y = self._dequantized(x, plan["scale"].reshape(()) if alone else None)
        y = y if plan["row"] is None else y + plan["row"]
        y = y if alone else y * plan["scale"]
        return y if plan["constant"] is None else y + plan["constant"]

    def weight_number(self, weight: WeightCodes) -> Tensor:
        """Codes, scale and constant; a matrix is stored the other way round.

        All of it is constant, and Cast in place of DequantizeLinear lets onnxruntime work it out when it opens the file, so that a
        convolution keeps its blocked layout. onnxruntime may also make one kernel of a DequantizeLinear and its product with a float
        factor, and round that factor to 8 bits.
        """
        frozen = weight.frozen
        codes, turned = getattr(frozen, CODES), frozen.stored.ndim == 2
        y: Tensor = torch.onnx.ops.symbolic("Cast", (codes,), {"to": 1}, dtype=torch.float32, shape=codes.shape)
        for name, behind in (("sub", getattr(frozen, ZERO)), ("mul", getattr(frozen, FACTOR)), ("add", getattr(frozen, CONSTANT))):
            if behind is not None:
                y = getattr(y, name)(behind if turned or behind.ndim == 0 else behind.reshape(-1, *[1] * (y.ndim - 1)))
        return y.t() if turned else y

    def product(self, a: Any, b: Any, bias: Tensor | None = None) -> Tensor:
        """As planned."""
        if not (isinstance(a, Factor) and isinstance(b, Factor | WeightCodes)):
            return torch.matmul(number(a), number(b))
        plan = self._next()
        if not self.plans[self.position - 1].on_codes:
            y = F.linear(number(a), number(b), bias) if isinstance(b, WeightCodes) else torch.matmul(number(a), number(b))
            return y if plan["scale"] is None else y * plan["scale"]
        # Two dimensions and a vector behind them would become one operator of float numbers.
        is_flat = isinstance(b, WeightCodes) and a.ndim == 2
        a = a.unsqueeze(1) if is_flat else a
        left = self._dequantized(a)
        if isinstance(b, WeightCodes):
            axis = None if plan["weight_scale"].numel() == 1 else 1
            scale = plan["weight_scale"].reshape(()) if axis is None else plan["weight_scale"]
            right = dequantize(_present(getattr(b.frozen, CODES), scale, getattr(b.frozen, ZERO)), axis)
        else:
            right = self._dequantized(b)
        y = torch.matmul(left, right)
        for part in self._beside(plan, a, b):
            y = y + part
        blocks = self.plans[self.position - 1].blocks
        y = y.unflatten(-1, (blocks, -1)) if blocks else y
        if plan["scale"] is not None:
            y = y * (plan["scale"] if plan["columns_scale"] is None else plan["scale"] * plan["columns_scale"])
        for part in self._behind(plan, a, b):
            y = y + part
        y = y.flatten(-2) if blocks else y
        return y.squeeze(1) if is_flat else y

    def _beside(self, plan: dict[str, Tensor], a: Factor, b: Factor | WeightCodes) -> list[Tensor]:
        """What is added to the sum."""
        parts = [] if plan["row"] is None else [plan["row"]]
        if plan["sums"] is not None:
            parts.append(torch.matmul(self._dequantized(a), self._ones(a.shape[-1])) * plan["sums"])
        if plan["columns"] is not None:
            assert isinstance(b, Factor)  # noqa: S101  (narrows a type)
            parts.append(self._dequantized(b).sum(-2, keepdim=True) * plan["columns"])
        return parts

    def _behind(self, plan: dict[str, Tensor], a: Factor, b: Factor | WeightCodes) -> list[Tensor]:
        """What is added behind the scale."""
        parts = []
        if plan["constant"] is not None:
            parts.append(plan["constant"] if plan["later"] is None else plan["constant"] * plan["later"])
        if plan["left"] is not None:
            assert isinstance(b, Factor)  # noqa: S101  (narrows a type)
            parts.append(torch.matmul(plan["left"], self._dequantized(b)) * plan["left_scale"])
        if plan["right"] is not None:
            parts.append(torch.matmul(self._dequantized(a), plan["right"]) * plan["right_scale"])
        return parts

    def _ones(self, size: int) -> Tensor:
        """(size, 1): a sum of codes is a product with them, in integers."""
        kept = getattr(self, f"ones_{size}", None) if isinstance(size, int) else None  # a free number of tokens has none
        return dequantize([torch.ones(size, 1, dtype=torch.int8) if kept is None else kept, self.one], None)

    def _next(self) -> dict[str, Any]:
        index = self.position
        self.position += 1
        return {name: getattr(self, f"{name}_{index}") for name in _TENSORS}

    def _dequantized(self, x: Factor, scale: Tensor | None = None) -> Tensor:
        return dequantize(_present(x.codes, self.one if scale is None else scale, x.zero), None)


def quantize(u: Tensor, step: Tensor, added: Tensor, name: str) -> Tensor:
    """QuantizeLinear with one step, to the type of `added`; `name` is that of the quantizer."""
    site = {SITE: name}
    codes: Tensor = torch.onnx.ops.symbolic("QuantizeLinear", (u, step, added), {}, dtype=added.dtype, shape=u.shape, metadata_props=site)
    return codes


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def dequantize(tensors: Sequence[Tensor], axis: int | None) -> Tensor:
    """DequantizeLinear of codes, scale and zero point, float32."""
    along: dict[str, Any] = {} if axis is None else {"axis": axis}
    y: Tensor = torch.onnx.ops.symbolic("DequantizeLinear", tensors, along, dtype=torch.float32, shape=tensors[0].shape)
    return y
