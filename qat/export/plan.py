"""Constants that turn products of a model into products of integer codes.

The constants are computed while the model runs on an image. If no scale or shift varies along a
summed dimension, then

    x @ weight = (codes_x @ codes_w * scale_w + row) * scale_x + constant

where a runtime computes codes_x @ codes_w * scale_w in one integer kernel. Half steps and
offsets of x are part of `row` and `constant`; `Plan` describes further terms.

The scale of a product can include the division by the step size of a quantizer that follows it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.export.codes import MAX_INT8_CODE, QuantizedTensor, StoredWeight, dequantize
from qat.functional.ste import view_along
from qat.model.freeze import DIRECT_ATTENTIONS
from qat.model.frozen import FrozenActivation, FrozenWeight
from qat.nn.attention import ScoredAttention
from qat.nn.attention_interface import HeadProducts
from qat.nn.fqvit import FqAttention
from qat.nn.qkr_attention import QkrAttention

_RIGHT_ROLES = frozenset({"k", "v"})
ONE = torch.ones(())
_CONSTANTS = (
    "scale",
    "columns_scale",
    "row",
    "ones",
    "sums",
    "columns",
    "constant",
    "constant_factor",
    "left",
    "left_scale",
    "weight_scale",
    "weight_zero",
)


class Plan(nn.Module):
    """Constants of one product, or of codes that are dequantized. None = not needed.

    Values that repeat along a dimension are stored once, with size 1 in this dimension.

    Attributes:
        on_codes: False = a scale, a shift or the offset of a right activation varies along the
            summed dimension, so the product multiplies dequantized numbers and uses only `scale`.
        blocks: number of equal parts into which the outputs are split, each with its own scales and
            constants of shape (..., blocks, 1 or out / blocks); 0 = not split.
        scale: factor of the sum of products.
        columns_scale: second factor of the sum, if one factor would be a whole matrix.
        row: summand that is added to the sum before the scale.
        ones: (K, 1), int8, all 1; a product with it sums the K left codes of a row in integers.
        sums: factor of the sum over a row of the left codes, added before the scale.
        columns: factor of the sum over a column of the right codes, added before the scale.
        constant: summand that is added after the scale; it includes the bias of a Linear.
        constant_factor: factor of the constant; None = 1.
        left: (..., 1 or N, K), offset of the left factor, which is multiplied by the right codes.
        left_scale: factor of the product of `left` and the right codes.
        weight_scale: (out,) or (), scale of the codes of a weight.
        weight_zero: zero point for each entry of `weight_scale`; None = 0.
    """

    def __init__(self, *, on_codes: bool = True, blocks: int = 0, **tensors: Tensor | None) -> None:
        super().__init__()
        self.on_codes = on_codes
        self.blocks = blocks
        for name in _CONSTANTS:
            self.register_buffer(name, tensors.get(name))


class Planner:
    """Plans the products of a model from its quantizers and the shapes of its tensors.

    Args:
        net: a frozen model; it is changed: the factors of scores in its attentions become 1.
        cpu: `any` or `fast`, see `code_offset`.

    Attributes:
        plans: plans of all products and dequantized codes, in the order in which they run.
        predivided: quantizers whose division by a step size is part of the product before them.
        token_steps: by weight, the step sizes that divide its outputs, (N, blocks): one for
            each token and part of the outputs.
        channel_steps: by weight, the step sizes that divide its outputs, (out,): one for each
            channel, or 1 for channels whose step sizes are in `token_steps`.
        steps: the step sizes that divide a product of two activations, by the names of their two
            quantizers: (1,), (N, 1) or (h, 1, d) for probabilities and values, whose product is
            (B, h, N, d). For queries and keys, this is a scalar: the inverse of the factor of
            scores, times the step size of the scores if their quantizer is in `predivided`.
    """

    def __init__(self, net: nn.Module, cpu: str) -> None:
        self.cpu = cpu
        self.plans: list[Plan] = []
        self.predivided: set[nn.Module] = set()
        self.token_steps: dict[nn.Module, Tensor] = {}
        self.channel_steps: dict[nn.Module, Tensor] = {}
        self.steps: dict[tuple[str, str], Tensor] = {}
        for module in net.modules():
            if isinstance(module, ScoredAttention):
                _fold_scores(self, module)
            elif isinstance(module, HeadProducts):
                _fold_factor(self, module)
            if type(module) in DIRECT_ATTENTIONS:
                _fold_queries_keys_values(self, module)
            elif isinstance(module, QkrAttention):
                _fold_reparameterized(self, module)
            else:
                continue
            _fold_heads(self, module)

    def activation(self, quantizer: FrozenActivation, x: Tensor) -> QuantizedTensor:
        """The tensor that a quantizer returns in the first run, in which products are planned."""
        zero = torch.zeros(())
        if quantizer.zero_point is not None:
            zero = view_along(quantizer.zero_point, x.ndim, quantizer.axis)
        integer_zero = integer_zero_point(quantizer)
        scale = view_along(quantizer.scale, x.ndim, quantizer.axis).float().expand(x.shape)
        shift = (integer_zero - zero).float().expand(x.shape)
        after = None if quantizer.after is None else quantizer.after.float().expand(x.shape)
        zero_code = code_offset(quantizer, self.cpu) + integer_zero
        return QuantizedTensor(x, scale, shift, after, quantizer.name, zero_code, self)

    def dequantize(self, x: QuantizedTensor | StoredWeight) -> Tensor:
        """Add the plan of a dequantization; a weight needs no plan."""
        if isinstance(x, StoredWeight):
            return x.value
        plan = Plan(
            scale=squeeze_constant_dims(x.scale),
            row=squeeze_constant_dims(x.shift),
            constant=squeeze_constant_dims(x.after),
        )
        self.plans.append(plan)
        return x.codes

    def product(
        self, a: QuantizedTensor, b: QuantizedTensor | StoredWeight, bias: Tensor | None = None
    ) -> Tensor:
        """Add the plan of a product of two activations, or of an activation and a weight."""
        if isinstance(b, StoredWeight):
            return self._product_with_weight(a, b, bias)
        step = self.steps.get((a.name, b.name), ONE)
        a = _fold_offset_into_shift(a, -1)
        b = _fold_offset_into_shift(b, -2)
        if _is_constant_along(a, -1) and _is_constant_along(b, -2) and b.after is None:
            self.plans.append(_plan_activation_product(a, b, step))
        else:
            self._product_of_numbers(a, b, step)
        return torch.matmul(a.codes, b.codes)

    def _product_with_weight(
        self, a: QuantizedTensor, b: StoredWeight, bias: Tensor | None
    ) -> Tensor:
        token_steps = self.token_steps.get(b.frozen)
        steps = self.channel_steps.get(b.frozen, ONE)
        if _is_constant_along(a, -1):
            self.plans.append(_plan_weight_product(a, b, bias, token_steps, steps))
        else:
            if token_steps is not None:
                block_steps = steps.unflatten(0, (token_steps.shape[1], -1))
                steps = (block_steps * token_steps.unsqueeze(-1)).flatten(1)
            self._product_of_numbers(a, b, steps)
        return F.linear(a.codes, b.value, bias)

    def _product_of_numbers(
        self, a: QuantizedTensor, b: QuantizedTensor | StoredWeight, step: Tensor
    ) -> None:
        """Add plans of a product of dequantized numbers, divided by `step`, and of its factors."""
        scale = None if step is ONE else 1 / step
        self.plans.append(Plan(on_codes=False, scale=scale))
        dequantize(a)
        dequantize(b)


def _fold_scores(planner: Planner, attention: Any) -> None:
    """Fold the factor and the step size of the scores into the product of queries and keys."""
    left, right = _score_quantizers(attention)
    scale = getattr(attention, "scale", None)
    if scale is None:
        return
    if not (isinstance(left, FrozenActivation) and isinstance(right, FrozenActivation)):
        return
    step = torch.tensor(1 / scale)
    scores_quantizer = getattr(attention, "scores_quantizer", None)
    if _can_predivide(scores_quantizer) and scores_quantizer.scale.numel() == 1:
        step = step * scores_quantizer.scale.reshape(())
        planner.predivided.add(scores_quantizer)
    planner.steps[left.name, right.name] = step
    if isinstance(attention, QkrAttention) and attention.per_key_weight() is not None:
        attention.folded_bias = attention.per_key_weight() * scale
    attention.scale = 1.0


def _fold_factor(planner: Planner, products: HeadProducts) -> None:
    """Fold the factor of the scores, an argument of `products`, into the product of q and k."""
    left, right = _score_quantizers(products)
    if not (isinstance(left, FrozenActivation) and isinstance(right, FrozenActivation)):
        return
    names = (left.name, right.name)

    def fold(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, mask, factor, *others = args
        planner.steps[names] = torch.tensor(1 / factor)
        return query, key, value, mask, 1.0, *others

    products.register_forward_pre_hook(fold)


def _score_quantizers(attention: Any) -> tuple[object, object]:
    """Quantizers of the two operands whose product is the scores; None if norms follow them."""
    if isinstance(attention, FqAttention):
        quantizer = attention.qkv_quantizer if _has_no_norms(attention) else None
        return quantizer, quantizer
    if isinstance(attention, QkrAttention):
        return attention.input_quantizer, attention.k_quantizer
    return attention.q_quantizer, attention.k_quantizer


def _fold_queries_keys_values(planner: Planner, attention: Any) -> None:
    """Fold the step sizes of queries, keys and values into the layer that computes all three."""
    quantizers = (attention.q_quantizer, attention.k_quantizer, attention.v_quantizer)
    weight_quantizer = getattr(attention.qkv, "weight_quantizer", None)
    if not isinstance(getattr(attention.qkv, "input_quantizer", None), FrozenActivation):
        return
    if not isinstance(weight_quantizer, FrozenWeight) or not _has_no_norms(attention):
        return
    if not all(map(_can_predivide, quantizers)):
        return
    size = attention.qkv.out_features // 3
    channel_steps = []
    token_scales: list[Tensor | None] = []
    for quantizer in quantizers:
        if _has_token_scales(quantizer):
            channel_steps.append(torch.ones(size))
            token_scales.append(quantizer.scale)
        else:
            channel_steps.append(quantizer.scale.expand(size))
            token_scales.append(None)
    planner.channel_steps[weight_quantizer] = torch.cat(channel_steps)
    num_tokens = next((scale.numel() for scale in token_scales if scale is not None), None)
    if num_tokens is not None:
        ones = torch.ones(num_tokens)
        token_steps = [ones if scale is None else scale for scale in token_scales]
        planner.token_steps[weight_quantizer] = torch.stack(token_steps, 1)
    planner.predivided.update(quantizers)


def _fold_reparameterized(planner: Planner, attention: Any) -> None:
    """Fold the step sizes of keys and values into the products that compute keys and values."""
    if not isinstance(attention.input_quantizer, FrozenActivation):
        return
    key_quantizer = attention.k_quantizer
    matrix_quantizer = attention.qk_quantizer
    if isinstance(matrix_quantizer, FrozenWeight) and _can_predivide(key_quantizer):
        out_features = len(matrix_quantizer.stored)
        if _has_token_scales(key_quantizer):
            # Step sizes differ by token and head, not by channel.
            planner.channel_steps[matrix_quantizer] = torch.ones(out_features)
            head_steps = key_quantizer.scale.reshape(-1, attention.num_heads)
            planner.token_steps[matrix_quantizer] = head_steps
        else:
            planner.channel_steps[matrix_quantizer] = key_quantizer.scale.expand(out_features)
        planner.predivided.add(key_quantizer)
    value_quantizer = attention.v_quantizer
    weight_quantizer = getattr(attention.v, "weight_quantizer", None)
    if not isinstance(weight_quantizer, FrozenWeight) or not _can_predivide(value_quantizer):
        return
    # Step sizes that differ between tokens are folded only for keys.
    if not _has_token_scales(value_quantizer):
        steps = value_quantizer.scale.expand(attention.v.out_features)
        planner.channel_steps[weight_quantizer] = steps
        planner.predivided.add(value_quantizer)


def _fold_heads(planner: Planner, attention: Any) -> None:
    """Fold the step size of the projection's input into the product before the projection."""
    left = attention.probs_quantizer
    right = attention.v_quantizer
    proj_quantizer = getattr(attention.proj, "input_quantizer", None)
    has_norm = not isinstance(attention.norm, nn.Identity)
    if has_norm or attention.gate is not None or attention.heads_per_group != 1:
        return
    if not (isinstance(left, FrozenActivation) and isinstance(right, FrozenActivation)):
        return
    if not _can_predivide(proj_quantizer):
        return
    step = proj_quantizer.scale
    if _has_token_scales(proj_quantizer):
        step = step.unsqueeze(-1)
    elif step.numel() > 1:
        step = step.reshape(attention.num_heads, 1, -1)
    planner.steps[left.name, right.name] = step
    planner.predivided.add(proj_quantizer)


def _has_no_norms(attention: nn.Module) -> bool:
    norms = (getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm"))
    return all(isinstance(norm, nn.Identity) for norm in norms)


def _can_predivide(quantizer: object) -> TypeGuard[FrozenActivation]:
    """True for a quantizer that divides its input without adding an offset first."""
    return isinstance(quantizer, FrozenActivation) and quantizer.before is None


def _has_token_scales(quantizer: FrozenActivation) -> bool:
    return quantizer.scale.numel() > 1 and quantizer.axis == -2


def integer_zero_point(quantizer: FrozenActivation) -> int:
    """The mean zero point, rounded up and clamped to the grid; products subtract this code."""
    zero = 0.0
    if quantizer.zero_point is not None:
        zero = float(quantizer.zero_point.float().mean().ceil())
    return int(min(max(zero, quantizer.qmin), quantizer.qmax))


def code_offset(quantizer: FrozenActivation, cpu: str) -> Tensor:
    """The number to add to codes so that they fit 8 bits: (), in the 8-bit type.

    Runtimes are fastest at uint8 times int8, so the right factor of a product is int8 unless the
    product could saturate.

    Args:
        quantizer: the quantizer of the codes.
        cpu: `any` = uint8 for right factors with codes beyond `MAX_INT8_CODE`; `fast` = int8.
    """
    offset = -128 if quantizer.qmax > 127 else 0
    is_small = max(-(quantizer.qmin + offset), quantizer.qmax + offset) <= MAX_INT8_CODE
    if quantizer.spec.role in _RIGHT_ROLES and (is_small or cpu == "fast"):
        return torch.tensor(offset, dtype=torch.int8)
    return torch.tensor(max(-quantizer.qmin, 0), dtype=torch.uint8)


def squeeze_constant_dims(t: Tensor | None) -> Any:
    """Shrink a tensor to size 1 along constant dimensions. Returns None for zeros or None."""
    if t is None or not t.any():
        return None
    for dim in range(t.ndim):
        first = t.narrow(dim, 0, 1)
        if t.stride(dim) == 0 or torch.equal(t, first.expand_as(t)):
            t = first
    return t.contiguous()


def _is_constant_along(x: QuantizedTensor, dim: int) -> bool:
    """True if scale and shift do not vary along a summed dimension."""
    scale = squeeze_constant_dims(x.scale)
    shift = squeeze_constant_dims(x.shift)
    return all(t is None or t.shape[dim] == 1 for t in (scale, shift))


def _plan_weight_product(
    a: QuantizedTensor,
    stored: StoredWeight,
    bias: Tensor | None,
    token_steps: Tensor | None,
    channel_steps: Tensor,
) -> Plan:
    """Plan of the product with a weight; the arithmetic is in float64.

    Args:
        a: left factor.
        stored: the weight.
        bias: bias of the layer, (out,), or None.
        token_steps: divisors of the outputs or None, see `Planner`.
        channel_steps: divisors of the outputs, see `Planner`.
    """
    scale = _to_double(squeeze_constant_dims(a.scale))
    shift = _to_double(squeeze_constant_dims(a.shift))
    sums = _to_double(stored.constant)
    factors = stored.centred_factors.double()
    inverse_steps = 1 / channel_steps.double()
    has_one_scale = scale.numel() == 1
    # Step sizes for the whole tensor, or for each output, become part of the weight's scales.
    tensor_scale = scale.reshape(()) if has_one_scale else ONE.double()
    weight_sums = factors.sum(1) * stored.scale.double() + factors.shape[1] * sums
    row = shift * weight_sums * tensor_scale * inverse_steps
    sums = sums * tensor_scale * inverse_steps
    weight_scale = (stored.scale.double() * tensor_scale * inverse_steps).float().squeeze()
    weight_zero = stored.zero_point
    if weight_zero is not None:
        weight_zero = weight_zero.squeeze().expand_as(weight_scale).clone()

    constant_factor = None
    blocks = 0
    if token_steps is not None:
        constant_factor = 1 / token_steps.double().unsqueeze(-1)  # (N, blocks, 1)
        blocks = constant_factor.shape[-2]
    elif not has_one_scale and not a.zero:
        # OpenVINO 2026.4 mistakes a scale of rows for a scale of columns, unless the codes have a
        # zero point or an operator is between product and scale. A split into one block is enough.
        blocks = 1
    constant = _constant_of_linear(a, stored, bias)
    if constant is not None:
        constant = constant * inverse_steps
        if blocks:
            constant = constant.unflatten(-1, (blocks, -1))
    outer_scale = constant_factor
    if not has_one_scale:
        if blocks:
            scale = scale.unsqueeze(-1)
        outer_scale = scale if constant_factor is None else scale * constant_factor
    ones = None
    if sums.any():
        ones = torch.ones(a.shape[-1], 1, dtype=torch.int8)

    # Runtimes merge a 2-D product and an added vector into a float operator, so add dimensions.
    ndim = max(a.ndim, 3)
    ndim_split = ndim + 1 if blocks else ndim
    return Plan(
        blocks=blocks,
        weight_scale=weight_scale,
        weight_zero=weight_zero,
        row=_add_leading_dims(row, ndim) if row.any() else None,
        ones=ones,
        sums=None if ones is None else _add_leading_dims(sums, ndim),
        scale=_add_leading_dims(outer_scale, ndim_split),
        constant=_add_leading_dims(constant, ndim_split),
        constant_factor=_add_leading_dims(constant_factor, ndim_split),
    )


def _to_double(t: Tensor | None) -> Tensor:
    """Convert a tensor to float64; None means 0."""
    return torch.zeros((), dtype=torch.float64) if t is None else t.double()


def _constant_of_linear(
    a: QuantizedTensor, stored: StoredWeight, bias: Tensor | None
) -> Tensor | None:
    """The bias, plus the weight times the offset after the quantizer of `a`; None = 0."""
    constant = None if bias is None else bias.double()
    after = squeeze_constant_dims(a.after)
    if after is None:
        return constant
    in_features = stored.centred_factors.shape[1]
    offset = after.double().expand(*after.shape[:-1], in_features) @ stored.value.double().t()
    return offset if constant is None else constant + offset


def _add_leading_dims(t: Tensor | None, ndim: int) -> Tensor | None:
    """Convert a tensor to float32, and add leading dimensions of size 1."""
    if t is None:
        return None
    return t.float().reshape([1] * (ndim - t.ndim) + list(t.shape))


def _fold_offset_into_shift(x: QuantizedTensor, dim: int) -> QuantizedTensor:
    """Make an offset part of the shift, if the offset is constant along the summed dimension."""
    after = squeeze_constant_dims(x.after)
    if after is None or after.shape[dim] > 1:
        return x
    return dataclasses.replace(x, shift=x.shift + after / x.scale, after=None)


def _plan_activation_product(a: QuantizedTensor, b: QuantizedTensor, step: Tensor) -> Plan:
    """Plan of ((A + da) sa + ca) ((B + db) sb), for codes A and B, divided by a step size."""
    sa = squeeze_constant_dims(a.scale)
    da = squeeze_constant_dims(a.shift)
    ca = squeeze_constant_dims(a.after)
    sb = squeeze_constant_dims(b.scale)
    db = squeeze_constant_dims(b.shift)
    row = None
    constant = None
    ones = None
    if db is not None:
        ones = torch.ones(a.shape[-1], 1, dtype=torch.int8)
        if da is not None:
            row = a.shape[-1] * da * db
        if ca is not None:
            constant = ca.sum(-1, keepdim=True) * db * sb / step
    rows_scale = sa
    columns_scale = sb
    if step.ndim == 0 or step.shape[-1] == 1:
        rows_scale = sa / step
    else:
        columns_scale = sb / step
    is_matrix = rows_scale.numel() > 1 and columns_scale.numel() > 1
    return Plan(
        scale=rows_scale if is_matrix else rows_scale * columns_scale,
        columns_scale=columns_scale if is_matrix else None,
        row=row,
        ones=ones,
        sums=db,
        columns=da,
        constant=constant,
        left=ca,
        left_scale=None if ca is None else sb / step,
    )
