"""What each product of a net adds to its codes, worked out on an image.

No scale varies along a summed dimension, so

    codes_x @ weight = (codes_x @ codes_w * scale_w + row) * scale_x + constant

where the product and scale_w are one integer kernel of a runtime. Half steps, zero points and offsets end in `row` and `constant`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.export.codes import QuantizedTensor, QuantizedWeight, StoredWeight, number
from qat.export.requantize import Divisor, fold_requantization
from qat.functional.ste import view_along
from qat.model.frozen import FrozenActivation

_RIGHT = frozenset({"k", "v"})
ONE = torch.ones(())


class Plan(nn.Module):
    """Of a product, or of codes that become numbers; tensors of as few elements as they can have, None = nothing.

    Attributes:
        on_codes: False = a scale varies along the summed dimension, and the product is one of numbers; `scale` alone counts then.
        blocks: scale and constant are those of this many parts of the outputs, (..., blocks, 1 or out / blocks); 0 = of the outputs.
        scale: what the sum is multiplied with.
        columns_scale: what that is multiplied with, where both together would be a matrix: worked out when a file is opened.
        row: added to the sum, before the scale.
        ones: (K, 1), int8: the sum over a row of the left codes is a product with them, in integers.
        sums: what that sum is multiplied with, and added, before the scale.
        columns: the same of a column of the right codes.
        constant: added after the scale; of a Linear its bias, too.
        later: what the constant is multiplied with.
        left: (..., 1 or N, K), offset of the left factor, multiplied with the right codes, then with left_scale.
        weight_scale: (out,) or (1,), of the codes of a weight.
    """

    scale: Tensor | None
    columns_scale: Tensor | None
    row: Tensor | None
    ones: Tensor | None
    sums: Tensor | None
    columns: Tensor | None
    constant: Tensor | None
    later: Tensor | None
    left: Tensor | None
    left_scale: Any
    weight_scale: Tensor | None

    def __init__(self, *, on_codes: bool = True, blocks: int = 0, **tensors: Tensor | None) -> None:
        super().__init__()
        self.on_codes, self.blocks = on_codes, blocks
        for name in Plan.__annotations__:
            self.register_buffer(name, tensors.get(name))


class Planner:
    """Works products out.

    Args:
        net: frozen.

    Attributes:
        plans: of all products and numbers, in the order in which they run.
    """

    def __init__(self, net: nn.Module) -> None:
        self.plans: list[Plan] = []
        self.folded = fold_requantization(net)

    def activation(self, grid: FrozenActivation, x: Tensor) -> QuantizedTensor:
        """What a quantizer gives."""
        zero = torch.zeros(()) if grid.zero_point is None else view_along(grid.zero_point, x.ndim, grid.axis)
        step, whole = view_along(grid.scale, x.ndim, grid.axis), whole_zero(grid)
        codes = grid.codes(x * step if grid in self.folded.grids else x).float()
        scale, shift = (t.float().expand(codes.shape) for t in (step, whole - zero))
        after = None if grid.after is None else grid.after.float().expand(codes.shape)
        return QuantizedTensor(codes - whole, scale, shift, after, grid.name, torch.tensor(whole + added_code(grid)), self)

    def number(self, x: QuantizedTensor) -> Tensor:
        """(codes + shift) * scale + after."""
        self.plans.append(Plan(scale=smallest(x.scale), row=smallest(x.shift), constant=smallest(x.after)))
        return _value(x)

    def weight_number(self, weight: QuantizedWeight) -> Tensor:
        """As stored."""
        return weight.stored.value

    def product(self, a: Any, b: Any, bias: Tensor | None = None) -> Tensor:
        """Of numbers, while the plan is noted."""
        if not (isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor | QuantizedWeight)):
            return torch.matmul(number(a), number(b))
        if isinstance(b, QuantizedWeight):
            divisor = self.folded.weights.get(b.frozen)
            step, is_outside = ONE if divisor is None else divisor.scale, _is_outside(a, -1)
            plan = _with_weight(a, b.stored, bias, divisor) if is_outside else None
        else:
            step, a, b = self.folded.activations.get((a.name, b.name), ONE), _offset_in_shift(a, -1), _offset_in_shift(b, -2)
            plan = _with_activation(a, b, step) if _is_outside(a, -1) and _is_outside(b, -2) and b.after is None else None
        self.plans.append(plan or Plan(on_codes=False, scale=None if step is ONE else 1 / step))
        left = number(a) if plan is None else _value(a)
        if isinstance(b, QuantizedWeight):
            return F.linear(left, b.stored.value, bias) / step
        return torch.matmul(left, number(b) if plan is None else _value(b)) / step


def whole_zero(grid: FrozenActivation) -> int:
    """The code from which products count: that of zero, or the one above it where zero lies between two codes."""
    zero = 0.0 if grid.zero_point is None else float(grid.zero_point.float().mean().ceil())
    return int(min(max(zero, grid.qmin), grid.qmax))


def code_type(grid: FrozenActivation) -> torch.dtype:
    """Of 8 bits: on the right of a product codes have a sign, since what runtimes are fast at is uint8 times int8."""
    return torch.int8 if grid.spec.role in _RIGHT else torch.uint8


def added_code(grid: FrozenActivation) -> int:
    """What makes codes fit their type."""
    if code_type(grid) == torch.uint8:
        return max(-grid.qmin, 0)
    return 0 if grid.qmax <= torch.iinfo(torch.int8).max else torch.iinfo(torch.int8).min


def smallest(t: Tensor | None) -> Tensor | None:
    """Without what repeats itself: dimensions along which it stays the same have size 1 then; None of zeros."""
    if t is None or not t.any():
        return None
    for dim in range(t.ndim):
        one = t.narrow(dim, 0, 1)
        t = one if t.stride(dim) == 0 or torch.equal(t, one.expand_as(t)) else t
    return t.contiguous()


def _value(x: QuantizedTensor) -> Tensor:
    value: Tensor = (x.codes + x.shift) * x.scale
    return value if x.after is None else value + x.after


def _is_outside(x: QuantizedTensor, dim: int) -> bool:
    """Whether scale and shift can stand outside of a sum along a dimension."""
    return all(t is None or t.shape[dim] == 1 for t in (smallest(x.scale), smallest(x.shift)))


def _with_weight(a: QuantizedTensor, stored: StoredWeight, bias: Tensor | None, divisor: Divisor | None) -> Plan:
    scale, shift, after = (None if t is None else t.double() for t in map(smallest, (a.scale, a.shift, a.after)))
    factors = stored.factors.double()
    sums = None if stored.constant is None else stored.constant.double()
    row = None
    if shift is not None:
        row = shift * (factors.sum(1) * stored.scale.double() + (0 if sums is None else factors.shape[1] * sums))
    constant = None if bias is None else bias.double()
    if after is not None:
        offset = after.expand(*after.shape[:-1], factors.shape[1]) @ stored.value.double().t()
        constant = offset if constant is None else constant + offset
    # What is one number for the tensor or one for each output goes with the scales of the weight.
    columns = torch.ones(1, dtype=torch.float64) if divisor is None else 1 / divisor.columns.double()
    one = scale.reshape(()) if scale is not None and scale.numel() == 1 else ONE.double()
    row, sums = (None if t is None else t * one * columns for t in (row, sums))
    scale = None if scale is None or scale.numel() == 1 else scale
    constant = None if constant is None else constant * columns
    later = None if divisor is None or divisor.rows is None else 1 / divisor.rows.double().unsqueeze(-1)  # (N, 3, 1)
    # OpenVINO 2026.4 takes a scale of rows for one of columns where nothing, not even a zero point, stands between it and the product.
    blocks = later.shape[-2] if later is not None else int(scale is not None and not a.zero)
    if blocks:
        scale = None if scale is None else scale.unsqueeze(-1)
        constant = None if constant is None else constant.unflatten(-1, (blocks, -1))
    if later is not None:
        scale = later if scale is None else scale * later
    # With leading dimensions of 1: a product and a vector that is added would become one operator of float numbers.
    ndim = max(a.ndim, 3)
    before = {name: _in_dimensions(t, ndim) for name, t in (("row", row), ("sums", sums))}
    behind = {name: _in_dimensions(t, ndim + (blocks > 0)) for name, t in (("scale", scale), ("constant", constant), ("later", later))}
    before["ones"] = None if sums is None else _ones(a)
    return Plan(blocks=blocks, weight_scale=(stored.scale.double() * one * columns).float(), **before, **behind)  # type: ignore[arg-type]


def _in_dimensions(t: Tensor | None, ndim: int) -> Tensor | None:
    return None if t is None else t.float().reshape([1] * (ndim - t.ndim) + list(t.shape))


def _ones(a: QuantizedTensor) -> Tensor:
    return torch.ones(a.shape[-1], 1, dtype=torch.int8)


def _offset_in_shift(x: QuantizedTensor, dim: int) -> QuantizedTensor:
    """An offset that stays the same along a summed dimension is part of the shift."""
    after = smallest(x.after)
    if after is None or after.shape[dim] > 1 or x.scale is None:
        return x
    return dataclasses.replace(x, shift=x.shift + after / x.scale, after=None)


def _with_activation(a: QuantizedTensor, b: QuantizedTensor, step: Tensor) -> Plan:
    """(A + da) sa + ca times (B + db) sb, multiplied out, divided by the step size of the quantizer after it."""
    sa, da, ca = (smallest(t) for t in (a.scale, a.shift, a.after))
    sb, db = smallest(b.scale), smallest(b.shift)
    assert sa is not None  # noqa: S101  (step sizes are positive)
    assert sb is not None  # noqa: S101
    of_rows, of_columns = (sa / step, sb) if step.ndim == 0 or step.shape[-1] == 1 else (sa, sb / step)
    is_matrix = of_rows.numel() > 1 and of_columns.numel() > 1
    return Plan(
        scale=of_rows if is_matrix else of_rows * of_columns,
        columns_scale=of_columns if is_matrix else None,
        row=None if da is None or db is None else a.shape[-1] * da * db,
        ones=None if db is None else _ones(a),
        sums=db,
        columns=da,
        constant=None if ca is None or db is None else ca.sum(-1, keepdim=True) * db * sb / step,
        left=ca,
        left_scale=sb / step,
    )
