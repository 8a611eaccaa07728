"""Steps by which a quantizer divides what a product gives: one operator with the scale of the product, where nothing stands between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from qat.model.frozen import FrozenActivation, FrozenWeight
from qat.model.frozen.net import DIRECT
from qat.nn.attention import QkrAttention, ScoredAttention
from qat.nn.linear import QuantLinear


@dataclass(frozen=True)
class Divided:
    """What the outputs of a weight are divided by.

    Attributes:
        rows: (N, blocks), a step for each token and part of the outputs; None where the steps are one for the tensor or for a channel.
        columns: (out,), a step for each channel, 1 where there is one for each token.
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
class NextSteps:
    """Of a net.

    Attributes:
        weights: by the weight in front.
        values: (), (N, 1) or (h, 1, d), by the name of the values' quantizer: what leaves the heads (B, h, N, d) is divided by.
        grids: quantizers whose input arrives divided.
    """

    weights: dict[FrozenWeight, Divided] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    grids: set[FrozenActivation] = field(default_factory=set)


def next_steps(net: nn.Module) -> NextSteps:
    """Find them in the attentions of a frozen net."""
    found = NextSteps()
    for module in net.modules():
        if type(module) in DIRECT:
            _queries_keys_values(found, module)
        elif isinstance(module, QkrAttention):
            _reparameterized(found, module)
        if type(module) in DIRECT or isinstance(module, QkrAttention):
            _heads(found, module)  # type: ignore[arg-type]
    return found


def _queries_keys_values(found: NextSteps, attention: Any) -> None:
    grids = attention.q_quantizer, attention.k_quantizer, attention.v_quantizer
    is_direct = isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    if not (is_direct and _has_codes(attention.qkv) and all(map(_is_plain, grids))):
        return
    size = attention.qkv.out_features // len(grids)
    each = [_is_each_token(one) for one in grids]
    columns = torch.cat([torch.ones(size) if is_each else one.scale.expand(size) for one, is_each in zip(grids, each, strict=True)])
    tokens = max((one.scale.numel() for one, is_each in zip(grids, each, strict=True) if is_each), default=0)
    rows = [one.scale if is_each else torch.ones(tokens) for one, is_each in zip(grids, each, strict=True)]
    found.weights[attention.qkv.weight_quantizer] = Divided(torch.stack(rows, 1) if tokens else None, columns)
    found.grids.update(grids)


def _reparameterized(found: NextSteps, attention: QkrAttention) -> None:
    """Keys have a step for each token and head, values are as they leave their Linear."""
    keys: object = attention.k_quantizer
    values: object = attention.v_quantizer
    if isinstance(attention.qk_quantizer, FrozenWeight) and isinstance(attention.input_quantizer, FrozenActivation) and _is_plain(keys):
        size = len(attention.qk_quantizer.stored)
        rows = keys.scale.reshape(-1, attention.num_heads) if _is_each_token(keys) else None
        found.weights[attention.qk_quantizer] = Divided(rows, torch.ones(size) if rows is not None else keys.scale.expand(size))
        found.grids.add(keys)
    weight = attention.v.weight_quantizer if isinstance(attention.v, QuantLinear) else None
    is_whole = isinstance(attention.input_quantizer, FrozenActivation) and isinstance(weight, FrozenWeight)
    if is_whole and _is_plain(values) and not _is_each_token(values):
        found.weights[weight] = Divided(None, values.scale.expand(attention.v.out_features))  # type: ignore[index]
        found.grids.add(values)


def _heads(found: NextSteps, attention: ScoredAttention) -> None:
    """What leaves the heads is put side by side, and comes to the projection."""
    values: object = attention.v_quantizer
    grid: object = attention.proj.input_quantizer if isinstance(attention.proj, QuantLinear) else None
    is_direct = isinstance(attention.norm, nn.Identity) and attention.gate is None and attention.groups == 1
    is_on_codes = isinstance(attention.probs_quantizer, FrozenActivation) and isinstance(values, FrozenActivation)
    if not (is_direct and is_on_codes and _is_plain(grid)):
        return
    step = grid.scale
    if step.numel() > 1:
        step = step.unsqueeze(-1) if _is_each_token(grid) else step.reshape(attention.num_heads, 1, -1)
    found.values[values.name] = step  # type: ignore[attr-defined]
    found.grids.add(grid)


def _has_codes(linear: object) -> bool:
    if not isinstance(linear, QuantLinear):
        return False
    return isinstance(linear.input_quantizer, FrozenActivation) and isinstance(linear.weight_quantizer, FrozenWeight)


def _is_plain(grid: object) -> TypeGuard[FrozenActivation]:
    """A quantizer with nothing in front of its division."""
    return isinstance(grid, FrozenActivation) and grid.before is None


def _is_each_token(grid: FrozenActivation) -> bool:
    return grid.scale.numel() > 1 and grid.axis == -2
