"""Which layer gets how many bits: assignments that fit a size, their seeds and mutations, and the front of size against loss.

An assignment has one width per layer. Source: greedy steps by loss per byte are those of the multiple-choice knapsack problem (Sinha and
Zoltners 1979); the rest is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from qat.functional.packing import packed_bytes

Assignment = tuple[int, ...]
# A layer and the width it gets.
Step = tuple[int, int]


def assigned_bytes(numels: Sequence[int], assignment: Assignment) -> int:
    """Bytes of all codes; a scale does not depend on a width."""
    return sum(packed_bytes(n, bits) for n, bits in zip(numels, assignment, strict=True))


def average_bits(numels: Sequence[int], assignment: Assignment) -> float:
    """Mean width of a code."""
    return sum(n * bits for n, bits in zip(numels, assignment, strict=True)) / sum(numels)


def front(sizes: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Which points no other one beats: of those as small, the lowest loss; of equals, the first. Indices, by ascending size."""
    kept: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i], losses[i], i)):
        if not kept or losses[index] < losses[kept[-1]]:
            kept.append(index)
    return kept


def spread(n: int, count: int, always: int) -> list[int]:
    """Up to `count` of the numbers below `n`, ascending: both ends, `always`, and others at even distances."""
    if count <= 0 or n <= 0:
        return []
    if count >= n:
        return list(range(n))
    chosen = [round(i * (n - 1) / (count - 1)) for i in range(count)] if count > 1 else [always]
    if always not in chosen:
        # An end gives way only where there is nothing between them.
        inner = range(1, count - 1) if count > 2 else range(count)
        chosen[min(inner, key=lambda i: abs(chosen[i] - always))] = always
    return sorted(chosen)


def single_steps(base: Assignment, choices: Sequence[int]) -> list[Assignment]:
    """All assignments that differ from `base` in one layer."""
    return [(*base[:i], bits, *base[i + 1 :]) for i in range(len(base)) for bits in choices if bits != base[i]]


def rises(base: float, losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """By how much each layer's loss is above `base`, per layer and choice, choices ascending: none below 0, none above that of fewer bits.

    What is against that is noise: the fitness of two nets that are both next to the float one.
    """
    return [[max(0.0, max(row[k:]) - base) for k in range(len(row))] for row in losses]


def greedy_path(numels: Sequence[int], choices: Sequence[int], table: Sequence[Sequence[float]]) -> list[Assignment]:
    """From all layers at the highest width to all at the lowest: each step is that with the least rise per byte.

    Args:
        numels: entries of each layer's weight.
        choices: widths, ascending.
        table: `rises`; those of several layers are taken to add up.

    Returns:
        Every assignment on the way, both ends included.
    """
    at = [len(choices) - 1] * len(numels)
    path = [tuple(choices[k] for k in at)]

    def price(step: Step) -> tuple[float, int, int]:
        layer, k = step
        saved = packed_bytes(numels[layer], choices[at[layer]]) - packed_bytes(numels[layer], choices[k])
        return (table[layer][k] - table[layer][at[layer]]) / max(saved, 1), -k, layer

    while any(at):
        layer, k = min(((i, k) for i in range(len(at)) for k in range(at[i])), key=price)
        at[layer] = k
        path.append(tuple(choices[k] for k in at))
    return path


def lowered(assignment: Assignment, numels: Sequence[int], choices: Sequence[int], limit: int, order: Sequence[int]) -> Assignment:
    """Lower layers in `order`, a width at a time and around again, until `limit` bytes hold.

    Args:
        assignment: any.
        numels: entries of each layer's weight.
        choices: widths, ascending; with the lowest everywhere the limit holds.
        limit: bytes.
        order: every layer once.
    """
    at = [choices.index(bits) for bits in assignment]
    free = limit - assigned_bytes(numels, assignment)
    for layer in itertools.chain.from_iterable(itertools.repeat(order, len(choices) - 1)):
        if free < 0 and at[layer] > 0:
            free += packed_bytes(numels[layer], choices[at[layer]]) - packed_bytes(numels[layer], choices[at[layer] - 1])
            at[layer] -= 1
    return tuple(choices[k] for k in at)


def filled(assignment: Assignment, numels: Sequence[int], choices: Sequence[int], limit: int, order: Sequence[int]) -> Assignment:
    """Raise layers in `order` by a width each, those that still fit into `limit` bytes; see `lowered`."""
    at = [choices.index(bits) for bits in assignment]
    free = limit - assigned_bytes(numels, assignment)
    for layer in order:
        if at[layer] + 1 == len(choices):
            continue
        more = packed_bytes(numels[layer], choices[at[layer] + 1]) - packed_bytes(numels[layer], choices[at[layer]])
        if more <= free:
            free -= more
            at[layer] += 1
    return tuple(choices[k] for k in at)


def mutated(parent: Assignment, choices: Sequence[int], most: int, generator: torch.Generator) -> tuple[Assignment, list[int]]:
    """A child with another width in up to `most` layers, at least one, and the order in which layers may give way.

    Half of the children get neighbouring widths, the others any: the first refine, the second leave a valley.

    Args:
        parent: widths out of `choices`.
        choices: at least two, ascending.
        most: layers that change.
        generator: of all draws.

    Returns:
        The child, and every layer once, in an order that is drawn; those that changed come last.
    """
    count = 1 + int(torch.randint(min(most, len(parent)), (1,), generator=generator))
    order = torch.randperm(len(parent), generator=generator).tolist()
    near = bool(torch.randint(2, (1,), generator=generator))
    child = list(parent)
    for layer in order[:count]:
        k = choices.index(child[layer])
        others = [i for i in range(len(choices)) if i != k and (abs(i - k) == 1 or not near)]
        child[layer] = choices[others[int(torch.randint(len(others), (1,), generator=generator))]]
    return tuple(child), [*order[count:], *order[:count]]


def brood(make: Callable[[], Assignment], seen: Callable[[Assignment], bool], count: int, *, tries: int = 20) -> list[Assignment]:
    """Up to `count` different children that nobody has seen; fewer where `tries` a child were not enough to find them."""
    found: list[Assignment] = []
    for _ in range(count * tries):
        child = make()
        if not seen(child) and child not in found:
            found.append(child)
        if len(found) == count:
            break
    return found
