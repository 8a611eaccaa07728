"""What each product of a net adds to its codes, worked out on an image.

No scale varies along a summed dimension, so

    codes_x @ weight = (codes_x @ codes_w * scale_w + row) * scale_x + constant

where the product and scale_w are one integer kernel of a runtime. Half steps, zero points and offsets end in `row` and `constant`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.export.factors import Factor, WeightCodes, number
from qat.export.next_step import Divided, next_steps
from qat.export.stored_weights import Stored
from qat.functional.ste import view_along
from qat.model.frozen import FrozenActivation, FrozenWeight

_RIGHT = frozenset({"k", "v"})
ONE = torch.ones(())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of a product, or of a factor that becomes numbers; tensors of as few elements as they can have, None = nothing.

    Attributes:
        on_codes: False = a scale varies along the summed dimension, and the product is one of numbers; `scale` alone counts then.
        scale: behind the sum.
        columns_scale: what that is multiplied with, where both together would be a matrix: worked out when a file is opened.
        row: added to the sum, in front of the scale.
        sums: what the sum over a row of the left codes is multiplied with, and added, in front of the scale.
        columns: the same of a column of the right codes.
        constant: added behind the scale; of a Linear its bias, too.
        later: what the constant is multiplied with.
        left: (..., 1 or N, K), offset of the left factor, multiplied with the right codes.
        left_scale: behind that product.
        right: (..., K, 1 or M), offset of the right factor, multiplied with the left codes.
        right_scale: behind that product.
        weight_scale: (out,) or (1,), of the codes of a weight.
        size: of the summed dimension.
        blocks: scale and constant are those of this many parts of the outputs, (..., blocks, 1 or out / blocks); 0 = of the outputs.
    """

    on_codes: bool = True
    scale: Tensor | None = None
    columns_scale: Tensor | None = None
    row: Tensor | None = None
    sums: Tensor | None = None
    columns: Tensor | None = None
    constant: Tensor | None = None
    later: Tensor | None = None
    left: Tensor | None = None
    left_scale: Tensor | None = None
    right: Tensor | None = None
    right_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    size: int = 0
    blocks: int = 0


class Planner:
    """Works products out.

    Args:
        net: frozen.

    Attributes:
        plans: of all products and numbers, in the order in which they run.
    """

    def __init__(self, net: nn.Module) -> None:
        self.plans: list[Plan] = []
        found = next_steps(net)
        self.behind_weights, self.behind_values = found.weights, found.values
        # Quantizers whose input is divided by their step already.
        self.in_codes = found.grids

    def activation(self, grid: FrozenActivation, x: Tensor) -> Factor:
        """What a quantizer gives."""
        zero = torch.zeros(()) if grid.zero_point is None else view_along(grid.zero_point, x.ndim, grid.axis)
        step, whole = view_along(grid.scale, x.ndim, grid.axis), whole_zero(grid)
        codes = grid.codes(x * step if grid in self.in_codes else x).float()
        scale, shift = (t.float().expand(codes.shape) for t in (step, whole - zero))
        after = None if grid.after is None else grid.after.float().expand(codes.shape)
        zero_code = torch.tensor(whole + added_code(grid))
        return Factor(codes - whole, scale, after, 0, grid.name, shift=shift, zero=zero_code, graph=self)

    def weight(self, frozen: FrozenWeight, form: Stored) -> WeightCodes:
        """Of a frozen weight."""
        return WeightCodes(frozen, form, self)

    def number(self, x: Factor) -> Tensor:
        """(codes + shift) * scale + after."""
        self.plans.append(Plan(scale=smallest(x.scale), row=smallest(x.shift), constant=smallest(x.after)))
        return _value(x)

    def weight_number(self, weight: WeightCodes) -> Tensor:
        """As stored."""
        return weight.form.value

    def product(self, a: Any, b: Any, bias: Tensor | None = None) -> Tensor:
        """Of numbers, while the plan is noted."""
        if not (isinstance(a, Factor) and isinstance(b, Factor | WeightCodes)):
            return torch.matmul(number(a), number(b))
        is_outside = _is_outside(a, -1) and (isinstance(b, WeightCodes) or _is_outside(b, -2))
        divided = self.behind_weights.get(b.frozen) if isinstance(b, WeightCodes) else None
        step = self.behind_values.get(b.name, ONE) if isinstance(b, Factor) else ONE if divided is None else divided.scale
        if not is_outside:
            self.plans.append(Plan(on_codes=False, scale=None if step is ONE else 1 / step))
            y = F.linear(number(a), number(b), bias) if isinstance(b, WeightCodes) else torch.matmul(number(a), number(b))
            return y / step
        if isinstance(b, WeightCodes):
            self.plans.append(_with_weight(a, b.form, bias, divided))
            return F.linear(_value(a), b.form.value, bias) / step
        self.plans.append(_with_factor(_in_codes(a, -1), _in_codes(b, -2), step))
        return torch.matmul(_value(a), _value(b)) / step


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


def _value(x: Factor) -> Tensor:
    assert x.shift is not None  # noqa: S101  (the first time)
    value = (x.codes + x.shift) * x.scale
    return value if x.after is None else value + x.after


def _is_outside(x: Factor, dim: int) -> bool:
    """Whether scale and shift can stand outside of a sum along a dimension."""
    return all(t is None or t.shape[dim] == 1 for t in (smallest(x.scale), smallest(x.shift)))


def _with_weight(a: Factor, form: Stored, bias: Tensor | None, divided: Divided | None) -> Plan:
    scale, shift, after = (None if t is None else t.double() for t in map(smallest, (a.scale, a.shift, a.after)))
    factors = form.factors.double()
    per_row = form.scale.double().expand(len(factors))
    sums = None if form.constant is None else form.constant.double()
    row = None if shift is None else shift * (factors.sum(1) * per_row + (0 if sums is None else factors.shape[1] * sums))
    constant = None if bias is None else bias.double()
    if after is not None:
        behind = after.expand(*after.shape[:-1], factors.shape[1]) @ form.value.double().t()
        constant = behind if constant is None else constant + behind
    # What is one number for the tensor or one for each output goes with the scales of the weight.
    columns = torch.ones(1, dtype=torch.float64) if divided is None else 1 / divided.columns.double()
    one = scale.reshape(()) if scale is not None and scale.numel() == 1 else torch.ones((), dtype=torch.float64)
    weight_scale = form.scale.double() * one * columns
    row, sums = (None if t is None else t * one * columns for t in (row, sums))
    scale = None if scale is None or scale.numel() == 1 else scale
    constant = None if constant is None else constant * columns
    later = None if divided is None or divided.rows is None else 1 / divided.rows.double().unsqueeze(-1)  # (N, 3, 1)
    # OpenVINO 2026.4 takes a scale of rows for one of columns where nothing, not even a zero point, stands between it and the product.
    blocks = later.shape[-2] if later is not None else int(scale is not None and not a.zero)
    ndim = max(a.ndim, 3)
    if blocks:
        scale = None if scale is None else scale.unsqueeze(-1)
        constant = None if constant is None else constant.unflatten(-1, (blocks, -1))
    if later is not None:
        scale = later if scale is None else scale * later
    ndim_behind = ndim + (blocks > 0)
    return Plan(
        row=_beside(row, ndim),
        sums=_beside(sums, ndim),
        scale=_beside(scale, ndim_behind),
        constant=_beside(constant, ndim_behind),
        later=_beside(later, ndim_behind),
        weight_scale=weight_scale.float(),
        size=a.shape[-1],
        blocks=blocks,
    )


def _beside(t: Tensor | None, ndim: int) -> Tensor | None:
    """With leading dimensions of 1: a product and a vector that is added would become one operator of float numbers."""
    return None if t is None else t.float().reshape([1] * (ndim - t.ndim) + list(t.shape))


def _in_codes(x: Factor, dim: int) -> Factor:
    """With an offset that stays the same along a summed dimension in the shift."""
    after = smallest(x.after)
    if after is None or after.shape[dim] > 1:
        return x
    assert x.shift is not None  # noqa: S101  (the first time)
    return dataclasses.replace(x, shift=x.shift + after / x.scale, after=None)


def _with_factor(a: Factor, b: Factor, step: Tensor) -> Plan:
    """(A + da) sa + ca times (B + db) sb + cb, multiplied out, by the step of the quantizer behind it."""
    (sa, da, ca), (sb, db, cb) = ([smallest(t) for t in (x.scale, x.shift, x.after)] for x in (a, b))
    assert sa is not None  # noqa: S101  (steps are positive)
    assert sb is not None  # noqa: S101
    row = None if da is None or db is None else a.shape[-1] * da * db
    constants = []
    if ca is not None and db is not None:
        constants.append(ca.sum(-1, keepdim=True) * db * sb)
    if cb is not None and da is not None:
        constants.append(cb.sum(-2, keepdim=True) * da * sa)
    if ca is not None and cb is not None:
        constants.append(ca @ cb)
    constant = functools.reduce(torch.add, constants) / step if constants else None
    of_rows, of_columns = (sa / step, sb) if step.ndim == 0 or step.shape[-1] == 1 else (sa, sb / step)
    is_matrix = of_rows.numel() > 1 and of_columns.numel() > 1
    return Plan(
        scale=of_rows if is_matrix else of_rows * of_columns,
        columns_scale=of_columns if is_matrix else None,
        row=row,
        sums=db,
        columns=da,
        constant=constant,
        left=ca,
        left_scale=sb / step,
        right=cb,
        right_scale=sa / step,
        size=a.shape[-1],
    )
