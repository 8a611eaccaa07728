"""One choice from each of several groups, at the least loss that fits a size: the multiple-choice knapsack problem, solved exactly.

Dynamic programming over sizes that keeps what no smaller choice beats. Source: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004,
chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Option = tuple[int, float]
MOST_STATES = 2**20


class _Front(NamedTuple):
    """Partial choices that no other one beats, by ascending size and falling loss.

    Attributes:
        sizes: (n,) int64, above the smallest, in units.
        losses: (n,) float64.
        parent: (n,) int64, index in the front before.
        option: (n,) int64, what the last group chose.
    """

    sizes: Tensor
    losses: Tensor
    parent: Tensor
    option: Tensor


def smallest(groups: Sequence[Sequence[Option]]) -> int:
    """The size that no choice is below."""
    return sum(min(size for size, _ in options) for options in groups)


def least_loss(groups: Sequence[Sequence[Option]], limit: int, *, most_states: int = MOST_STATES) -> list[int]:
    """Index of the option of each group: together they have the least sum of losses among those whose sizes sum up to `limit` at most.

    Of equal losses the smaller size is chosen. Exact where the sizes have at most `most_states` different sums, as those of networks do,
    whose widths are multiples of 8; else sizes are rounded up to a `most_states`th of what is to be distributed: the limit still holds.

    Args:
        groups: options (size, loss) of each, sizes in bytes; a loss may be negative.
        limit: bytes.
        most_states: sums that are told apart.

    Raises:
        ValueError: the smallest choice is larger than `limit`.
    """
    least = smallest(groups)
    if least > limit:
        raise ValueError(f"limit={limit}: the smallest choice has {least}")
    extra = [[size - min(size for size, _ in options) for size, _ in options] for options in groups]
    unit = math.gcd(*(e for options in extra for e in options)) or 1
    unit = max(unit, math.ceil((limit - least) / most_states))
    capacity = (limit - least) // unit
    zero = torch.zeros(1, dtype=torch.int64)
    fronts = [_Front(zero, torch.zeros(1, dtype=torch.float64), zero, zero)]
    for sizes, options in zip(extra, groups, strict=True):
        grown = torch.tensor([-(-size // unit) for size in sizes])
        fronts.append(_joined(fronts[-1], grown, torch.tensor([loss for _, loss in options], dtype=torch.float64), capacity))
    return _traced(fronts)


def _joined(front: _Front, sizes: Tensor, losses: Tensor, capacity: int) -> _Front:
    """Every member with every option of one more group, those beaten left out."""
    size = (front.sizes.unsqueeze(1) + sizes).flatten()
    loss = (front.losses.unsqueeze(1) + losses).flatten()
    n = len(sizes)
    fits = (size <= capacity).nonzero().flatten()
    by_loss = fits[loss[fits].argsort(stable=True)]
    order = by_loss[size[by_loss].argsort(stable=True)]
    lowest = loss[order].cummin(0).values
    before = torch.cat([lowest.new_full((1,), torch.inf), lowest[:-1]])
    kept = order[loss[order] < before]
    return _Front(size[kept], loss[kept], kept // n, kept % n)


def _traced(fronts: Sequence[_Front]) -> list[int]:
    at = len(fronts[-1].sizes) - 1  # the largest size has the least loss
    chosen = []
    for front in reversed(fronts[1:]):
        chosen.append(int(front.option[at]))
        at = int(front.parent[at])
    return chosen[::-1]
