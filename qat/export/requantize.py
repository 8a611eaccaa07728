"""Step sizes that a quantizer divides by, folded into the scale of the product before it, where nothing stands between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from qat.model.frozen import DIRECT, FrozenActivation, FrozenWeight
from qat.nn.attention import QkrAttention, ScoredAttention
from qat.nn.fqvit import FqAttention
from qat.nn.linear import QuantLinear


@dataclass(frozen=True)
class Divisor:
    """What the outputs of a weight are divided by.

    Attributes:
        rows: (N, blocks), a step size for each token and part of the outputs; None where it is one for the tensor or for a channel.
        columns: (out,), a step size for each channel, 1 where there is one for each token.
    """

    rows: Tensor | None
    columns: Tensor

    @property
    def scale(self) -> Tensor:
        """(N, out) or (out,)."""
        if self.rows is None:
            return self.columns
        return (self.columns.unflatten(0, (self.rows.shape[1], -1)) * self.rows.unsqueeze(-1)).flatten(1)


@dataclass
class Requantization:
    """The quantizers of a net whose input the product before them divides.

    Attributes:
        weights: by the weight of that product.
        activations: by the names of the quantizers of that product's factors: of probabilities and values (), (N, 1) or (h, 1, d), what
            leaves the heads (B, h, N, d) is divided by; of queries and keys the inverse of the factor of scores, times their step size if
            they are quantized.
        grids: the quantizers.
    """

    weights: dict[FrozenWeight, Divisor] = field(default_factory=dict)
    activations: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    grids: set[FrozenActivation] = field(default_factory=set)


def fold_requantization(net: nn.Module) -> Requantization:
    """Find them in the attentions of a frozen net, whose factors of scores are 1 afterwards."""
    found = Requantization()
    for module in net.modules():
        if isinstance(module, ScoredAttention):
            _scores(found, module)
        if type(module) in DIRECT:
            _queries_keys_values(found, module)
        elif isinstance(module, QkrAttention):
            _reparameterized(found, module)
        else:
            continue
        _heads(found, module)
    return found


def _scores(found: Requantization, attention: Any) -> None:
    if isinstance(attention, FqAttention):
        left = right = attention.qkv_quantizer
        is_direct = all(isinstance(getattr(attention, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm"))
    else:
        left = attention.input_quantizer if isinstance(attention, QkrAttention) else attention.q_quantizer
        right, is_direct = attention.k_quantizer, True
    scale = getattr(attention, "scale", None)
    if is_direct and scale is not None and isinstance(left, FrozenActivation) and isinstance(right, FrozenActivation):
        step = torch.tensor(1 / scale)
        if _has_no_offset(grid := getattr(attention, "scores_quantizer", None)) and grid.scale.numel() == 1:
            step = step * grid.scale.reshape(())
            found.grids.add(grid)
        found.activations[left.name, right.name] = step
        if isinstance(attention, QkrAttention) and attention.folded_bias is not None:
            attention.folded_bias *= scale
        attention.scale = 1.0


def _queries_keys_values(found: Requantization, attention: Any) -> None:
    grids = attention.q_quantizer, attention.k_quantizer, attention.v_quantizer
    is_direct = isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    linear = attention.qkv
    has_codes = (
        isinstance(linear, QuantLinear)
        and isinstance(linear.input_quantizer, FrozenActivation)
        and isinstance(linear.weight_quantizer, FrozenWeight)
    )
    if not (is_direct and has_codes and all(map(_has_no_offset, grids))):
        return
    size, each = linear.out_features // 3, [_is_each_token(one) for one in grids]
    columns = torch.cat([torch.ones(size) if is_each else one.scale.expand(size) for one, is_each in zip(grids, each, strict=True)])
    tokens = max((one.scale.numel() for one, is_each in zip(grids, each, strict=True) if is_each), default=0)
    rows = [one.scale if is_each else torch.ones(tokens) for one, is_each in zip(grids, each, strict=True)]
    found.weights[linear.weight_quantizer] = Divisor(torch.stack(rows, 1) if tokens else None, columns)
    found.grids.update(grids)


def _reparameterized(found: Requantization, attention: Any) -> None:
    """Keys have a step size for each token and head, values are as they leave their Linear."""
    keys, values = attention.k_quantizer, attention.v_quantizer
    if not isinstance(attention.input_quantizer, FrozenActivation):
        return
    if isinstance(attention.qk_quantizer, FrozenWeight) and _has_no_offset(keys):
        rows = keys.scale.reshape(-1, attention.num_heads) if _is_each_token(keys) else None
        size = len(attention.qk_quantizer.stored)
        found.weights[attention.qk_quantizer] = Divisor(rows, torch.ones(size) if rows is not None else keys.scale.expand(size))
        found.grids.add(keys)
    weight = attention.v.weight_quantizer if isinstance(attention.v, QuantLinear) else None
    if isinstance(weight, FrozenWeight) and _has_no_offset(values) and not _is_each_token(values):
        found.weights[weight] = Divisor(None, values.scale.expand(attention.v.out_features))
        found.grids.add(values)


def _heads(found: Requantization, attention: Any) -> None:
    """What leaves the heads is put side by side, and comes to the projection."""
    values, grid = attention.v_quantizer, attention.proj.input_quantizer if isinstance(attention.proj, QuantLinear) else None
    is_direct = isinstance(attention.norm, nn.Identity) and attention.gate is None and attention.groups == 1
    is_on_codes = isinstance(attention.probs_quantizer, FrozenActivation) and isinstance(values, FrozenActivation)
    if not (is_direct and is_on_codes and _has_no_offset(grid)):
        return
    step = grid.scale
    if step.numel() > 1:
        step = step.unsqueeze(-1) if _is_each_token(grid) else step.reshape(attention.num_heads, 1, -1)
    found.activations[attention.probs_quantizer.name, values.name] = step
    found.grids.add(grid)


def _has_no_offset(grid: object) -> TypeGuard[FrozenActivation]:
    """A quantizer with nothing before its division."""
    return isinstance(grid, FrozenActivation) and grid.before is None


def _is_each_token(grid: FrozenActivation) -> bool:
    return grid.scale.numel() > 1 and grid.axis == -2
