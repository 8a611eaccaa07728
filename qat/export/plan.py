"""What each product of a net adds to its codes, worked out while it runs on an image.

No scale varies along a summed dimension, so

    codes_x @ weight = (codes_x @ codes_w * scale_w + row) * scale_x + constant

where the product and scale_w are one integer kernel of a runtime. Half steps, zero points and offsets end in `row` and `constant`.

Step sizes that a quantizer divides by are folded into the scale of the product before it, where nothing stands between the two.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.export.codes import LARGEST_INT8, QuantizedTensor, StoredWeight, number
from qat.functional.ste import view_along
from qat.model.frozen import DIRECT, FrozenActivation, FrozenWeight
from qat.nn.attention import QkrAttention, ScoredAttention
from qat.nn.fqvit import FqAttention

_RIGHT = frozenset({"k", "v"})
ONE = torch.ones(())
_CONSTANTS = (
    "scale",
    "columns_scale",
    "row",
    "ones",
    "sums",
    "columns",
    "constant",
    "later",
    "left",
    "left_scale",
    "weight_scale",
    "weight_zero",
)


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
        weight_scale: (out,) or (), of the codes of a weight.
        weight_zero: their zero point, one for each of these scales; None = 0.
    """

    def __init__(self, *, on_codes: bool = True, blocks: int = 0, **tensors: Tensor | None) -> None:
        super().__init__()
        self.on_codes, self.blocks = on_codes, blocks
        for name in _CONSTANTS:
            self.register_buffer(name, tensors.get(name))


class Planner:
    """Works products out. No value of an image counts, only shapes and what quantizers hold.

    Args:
        net: frozen; the factors of scores in its attentions are 1 afterwards.
        cpu: `any` or `fast`, as `added_code` takes it.

    Attributes:
        plans: of all products and numbers, in the order in which they run.
        divided: quantizers whose input the product before them divides.
        rows: what the outputs of a weight are divided by: (N, blocks), a step size for each token and part of the outputs.
        columns: the same, (out,): a step size for each channel, 1 where there is one for each token.
        steps: by the names of the quantizers of a product's factors: of probabilities and values (), (N, 1) or (h, 1, d), what leaves the
            heads (B, h, N, d) is divided by; of queries and keys the inverse of the factor of scores, times their step size if they are
            quantized.
    """

    def __init__(self, net: nn.Module, cpu: str) -> None:
        self.cpu = cpu
        self.plans: list[Plan] = []
        self.divided: set[nn.Module] = set()
        self.rows: dict[nn.Module, Tensor] = {}
        self.columns: dict[nn.Module, Tensor] = {}
        self.steps: dict[tuple[str, str], Tensor] = {}
        for module in net.modules():
            if isinstance(module, ScoredAttention):
                _fold_scores(self, module)
            if type(module) in DIRECT:
                _fold_queries_keys_values(self, module)
            elif isinstance(module, QkrAttention):
                _fold_reparameterized(self, module)
            else:
                continue
            _fold_heads(self, module)

    def activation(self, grid: FrozenActivation, x: Tensor) -> QuantizedTensor:
        """What a quantizer gives."""
        zero = (
            torch.zeros(())
            if grid.zero_point is None
            else view_along(grid.zero_point, x.ndim, grid.axis)
        )
        whole = whole_zero(grid)
        scale, shift = (
            t.float().expand(x.shape)
            for t in (view_along(grid.scale, x.ndim, grid.axis), whole - zero)
        )
        after = None if grid.after is None else grid.after.float().expand(x.shape)
        return QuantizedTensor(
            x, scale, shift, after, grid.name, added_code(grid, self.cpu) + whole, self
        )

    def number(self, x: QuantizedTensor | StoredWeight) -> Tensor:
        """(codes + shift) * scale + after."""
        if isinstance(x, StoredWeight):
            return x.value
        self.plans.append(
            Plan(scale=smallest(x.scale), row=smallest(x.shift), constant=smallest(x.after))
        )
        return x.codes

    def product(
        self, a: QuantizedTensor, b: QuantizedTensor | StoredWeight, bias: Tensor | None = None
    ) -> Tensor:
        """Note the plan of a product."""
        if isinstance(b, StoredWeight):
            rows, step = self.rows.get(b.frozen), self.columns.get(b.frozen, ONE)
            plan = _with_weight(a, b, bias, rows, step) if _is_outside(a, -1) else None
            step = (
                step
                if rows is None
                else (step.unflatten(0, (rows.shape[1], -1)) * rows.unsqueeze(-1)).flatten(1)
            )
        else:
            step, a, b = (
                self.steps.get((a.name, b.name), ONE),
                _offset_in_shift(a, -1),
                _offset_in_shift(b, -2),
            )
            plan = (
                _with_activation(a, b, step)
                if _is_outside(a, -1) and _is_outside(b, -2) and b.after is None
                else None
            )
        self.plans.append(plan or Plan(on_codes=False, scale=None if step is ONE else 1 / step))
        for factor in () if plan else (a, b):
            number(factor)
        return (
            F.linear(a.codes, b.value, bias)
            if isinstance(b, StoredWeight)
            else torch.matmul(a.codes, b.codes)
        )


def _fold_scores(planner: Planner, attention: Any) -> None:
    if isinstance(attention, FqAttention):
        left = right = attention.qkv_quantizer if _has_no_norms(attention) else None
    else:
        left = (
            attention.input_quantizer
            if isinstance(attention, QkrAttention)
            else attention.q_quantizer
        )
        right = attention.k_quantizer
    scale = getattr(attention, "scale", None)
    if scale is None or not (
        isinstance(left, FrozenActivation) and isinstance(right, FrozenActivation)
    ):
        return
    step = torch.tensor(1 / scale)
    if (
        _has_no_offset(grid := getattr(attention, "scores_quantizer", None))
        and grid.scale.numel() == 1
    ):
        step = step * grid.scale.reshape(())
        planner.divided.add(grid)
    planner.steps[left.name, right.name] = step
    if isinstance(attention, QkrAttention) and attention.folded_bias is not None:
        attention.folded_bias *= scale
    attention.scale = 1.0


def _fold_queries_keys_values(planner: Planner, attention: Any) -> None:
    grids = attention.q_quantizer, attention.k_quantizer, attention.v_quantizer
    before, weight = (
        getattr(attention.qkv, name, None) for name in ("input_quantizer", "weight_quantizer")
    )
    is_direct = (
        isinstance(before, FrozenActivation)
        and _has_no_norms(attention)
        and all(map(_has_no_offset, grids))
    )
    if not (is_direct and isinstance(weight, FrozenWeight)):
        return
    size, tokens = (
        attention.qkv.out_features // 3,
        [one.scale.numel() for one in grids if _is_each_token(one)],
    )
    planner.columns[weight] = torch.cat([
        torch.ones(size) if _is_each_token(one) else one.scale.expand(size) for one in grids
    ])
    if tokens:
        planner.rows[weight] = torch.stack(
            [one.scale if _is_each_token(one) else torch.ones(tokens[0]) for one in grids], 1
        )
    planner.divided.update(grids)


def _fold_reparameterized(planner: Planner, attention: Any) -> None:
    """Keys have a step size for each token and head, values are as they leave their Linear."""
    if not isinstance(attention.input_quantizer, FrozenActivation):
        return
    keys, weight = attention.k_quantizer, attention.qk_quantizer
    if isinstance(weight, FrozenWeight) and _has_no_offset(keys):
        size, is_each_token = len(weight.stored), _is_each_token(keys)
        planner.columns[weight] = torch.ones(size) if is_each_token else keys.scale.expand(size)
        if is_each_token:
            planner.rows[weight] = keys.scale.reshape(-1, attention.num_heads)
        planner.divided.add(keys)
    values, weight = attention.v_quantizer, getattr(attention.v, "weight_quantizer", None)
    if isinstance(weight, FrozenWeight) and _has_no_offset(values) and not _is_each_token(values):
        planner.columns[weight] = values.scale.expand(attention.v.out_features)
        planner.divided.add(values)


def _fold_heads(planner: Planner, attention: Any) -> None:
    """What leaves the heads is put side by side, and comes to the projection."""
    probs, values, grid = (
        attention.probs_quantizer,
        attention.v_quantizer,
        getattr(attention.proj, "input_quantizer", None),
    )
    is_direct = (
        isinstance(attention.norm, nn.Identity) and attention.gate is None and attention.groups == 1
    )
    if (
        is_direct
        and isinstance(probs, FrozenActivation)
        and isinstance(values, FrozenActivation)
        and _has_no_offset(grid)
    ):
        step = grid.scale
        if step.numel() > 1:
            step = (
                step.unsqueeze(-1)
                if _is_each_token(grid)
                else step.reshape(attention.num_heads, 1, -1)
            )
        planner.steps[probs.name, values.name] = step
        planner.divided.add(grid)


def _has_no_norms(attention: nn.Module) -> bool:
    return all(
        isinstance(getattr(attention, name, nn.Identity()), nn.Identity)
        for name in ("q_norm", "k_norm")
    )


def _has_no_offset(grid: object) -> TypeGuard[FrozenActivation]:
    """A quantizer with nothing before its division."""
    return isinstance(grid, FrozenActivation) and grid.before is None


def _is_each_token(grid: FrozenActivation) -> bool:
    return grid.scale.numel() > 1 and grid.axis == -2


def whole_zero(grid: FrozenActivation) -> int:
    """The code from which products count: that of zero, or the one above it where zero lies between two codes."""
    zero = 0.0 if grid.zero_point is None else float(grid.zero_point.float().mean().ceil())
    return int(min(max(zero, grid.qmin), grid.qmax))


def added_code(grid: FrozenActivation, cpu: str) -> Tensor:
    """Return what is added to codes so that they fit a type of 8 bits: (), of that type.

    Runtimes are fastest at uint8 times int8, so the right factor of a product is int8, unless that could saturate.

    Args:
        grid: the quantizer of the codes.
        cpu: `any` chooses uint8 on the right for codes beyond `LARGEST_INT8`; `fast` always chooses int8 there.
    """
    added = -128 if grid.qmax > 127 else 0
    is_small = max(-(grid.qmin + added), grid.qmax + added) <= LARGEST_INT8
    if grid.spec.role in _RIGHT and (is_small or cpu == "fast"):
        return torch.tensor(added, dtype=torch.int8)
    return torch.tensor(max(-grid.qmin, 0), dtype=torch.uint8)


def smallest(t: Tensor | None) -> Any:
    """Without what repeats itself: dimensions along which it stays the same have size 1 then; None of zeros."""
    if t is None or not t.any():
        return None
    for dim in range(t.ndim):
        one = t.narrow(dim, 0, 1)
        t = one if t.stride(dim) == 0 or torch.equal(t, one.expand_as(t)) else t
    return t.contiguous()


def _is_outside(x: QuantizedTensor, dim: int) -> bool:
    """Whether scale and shift can stand outside of a sum along a dimension."""
    return all(t is None or t.shape[dim] == 1 for t in (smallest(x.scale), smallest(x.shift)))


def _with_weight(
    a: QuantizedTensor, stored: StoredWeight, bias: Tensor | None, rows: Tensor | None, step: Tensor
) -> Plan:
    none = torch.zeros((), dtype=torch.float64)
    scale, shift, sums = (
        none if t is None else t.double()
        for t in (smallest(a.scale), smallest(a.shift), stored.constant)
    )
    after, factors = smallest(a.after), stored.factors.double()
    constant = None if bias is None else bias.double()
    if after is not None:
        offset = (
            after.double().expand(*after.shape[:-1], factors.shape[1]) @ stored.value.double().t()
        )
        constant = offset if constant is None else constant + offset
    # What is one number for the tensor or one for each output goes with the scales of the weight.
    columns, is_alone = 1 / step.double(), scale.numel() == 1
    one = scale.reshape(()) if is_alone else ONE.double()
    row = shift * (factors.sum(1) * stored.scale.double() + factors.shape[1] * sums) * one * columns
    sums = sums * one * columns
    constant = None if constant is None else constant * columns
    later = None if rows is None else 1 / rows.double().unsqueeze(-1)  # (N, blocks, 1)
    # OpenVINO 2026.4 takes a scale of rows for one of columns where nothing, not even a zero point, stands between it and the product.
    blocks = int(not is_alone and not a.zero) if later is None else later.shape[-2]
    if blocks:
        scale = scale.unsqueeze(-1)
        constant = None if constant is None else constant.unflatten(-1, (blocks, -1))
    outer = later if is_alone else scale if later is None else scale * later

    def shaped(t: Tensor | None, more: int = 0) -> Tensor | None:
        """With leading dimensions of 1: a product and a vector that is added would become one operator of float numbers."""
        return (
            None
            if t is None
            else t.float().reshape([1] * (max(a.ndim, 3) + more - t.ndim) + list(t.shape))
        )

    is_split = int(blocks > 0)
    weight_scale, zero = (
        (stored.scale.double() * one * columns).float().squeeze(),
        stored.zero_point,
    )
    return Plan(
        blocks=blocks,
        weight_scale=weight_scale,
        weight_zero=None if zero is None else zero.squeeze().expand_as(weight_scale).clone(),
        row=shaped(row) if row.any() else None,
        ones=torch.ones(a.shape[-1], 1, dtype=torch.int8) if sums.any() else None,
        sums=shaped(sums) if sums.any() else None,
        scale=shaped(outer, is_split),
        constant=shaped(constant, is_split),
        later=shaped(later, is_split),
    )


def _offset_in_shift(x: QuantizedTensor, dim: int) -> QuantizedTensor:
    """An offset that stays the same along a summed dimension is part of the shift."""
    after = smallest(x.after)
    if after is None or after.shape[dim] > 1:
        return x
    return dataclasses.replace(x, shift=x.shift + after / x.scale, after=None)


def _with_activation(a: QuantizedTensor, b: QuantizedTensor, step: Tensor) -> Plan:
    """(A + da) sa + ca times (B + db) sb, multiplied out, divided by the step size of the quantizer after it."""
    sa, da, ca = (smallest(t) for t in (a.scale, a.shift, a.after))
    sb, db = smallest(b.scale), smallest(b.shift)
    of_rows, of_columns = (
        (sa / step, sb) if step.ndim == 0 or step.shape[-1] == 1 else (sa, sb / step)
    )
    is_matrix = of_rows.numel() > 1 and of_columns.numel() > 1
    return Plan(
        scale=of_rows if is_matrix else of_rows * of_columns,
        columns_scale=of_columns if is_matrix else None,
        row=None if da is None or db is None else a.shape[-1] * da * db,
        ones=None if db is None else torch.ones(a.shape[-1], 1, dtype=torch.int8),
        sums=db,
        columns=da,
        constant=None if ca is None or db is None else ca.sum(-1, keepdim=True) * db * sb / step,
        left=ca,
        left_scale=sb / step,
    )
