"""One option of each group under a limit. Oracle: all combinations."""

import itertools
import random

import pytest

from qat.functional.knapsack import least_loss, smallest


def drawn(seed):
    """A few groups of options whose sizes have nothing in common."""
    rng = random.Random(seed)
    options = lambda: [(rng.randint(1, 60), rng.choice([rng.uniform(-1, 3), float(rng.randint(0, 2))])) for _ in range(rng.randint(1, 4))]  # noqa: E731
    groups = [options() for _ in range(rng.randint(1, 6))]
    largest = sum(max(size for size, _ in options) for options in groups)
    return groups, rng.randint(smallest(groups), largest + 5)


def value(groups, chosen):
    """(loss, size) of one option of each group."""
    picked = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(loss for _, loss in picked), sum(size for size, _ in picked)


def best(groups, limit):
    """The least loss, and the least size that has it."""
    every = (value(groups, chosen) for chosen in itertools.product(*(range(len(group)) for group in groups)))
    return min(pair for pair in every if pair[1] <= limit)


@pytest.mark.parametrize("seed", range(60))
def test_no_combination_is_better(seed):
    groups, limit = drawn(seed)
    loss, size = value(groups, least_loss(groups, limit))
    assert size <= limit
    assert loss == pytest.approx(best(groups, limit)[0], abs=1e-12)


def test_of_equal_losses_the_smaller_is_chosen():
    groups = [[(8, 0.0), (4, 0.0), (2, 1.0)], [(6, 0.5), (3, 0.5)]]
    assert least_loss(groups, 100) == [1, 1]


def test_a_limit_that_just_fits():
    groups = [[(16, 0.0), (8, 1.0)], [(32, 0.0), (24, 0.5)]]
    assert least_loss(groups, 32) == [1, 1]
    assert least_loss(groups, 39) == [1, 1]
    assert least_loss(groups, 40) == [0, 1]
    assert least_loss(groups, 48) == [0, 0]


def test_a_limit_below_the_smallest_choice():
    with pytest.raises(ValueError, match=r"limit=31: the smallest choice has 32"):
        least_loss([[(16, 0.0), (8, 1.0)], [(32, 0.0), (24, 0.5)]], 31)


@pytest.mark.parametrize("seed", range(20))
def test_with_rounded_sizes_the_limit_holds(seed):
    groups, limit = drawn(seed)
    chosen = least_loss(groups, limit, most_states=16)
    loss, size = value(groups, chosen)
    assert size <= limit
    # What rounding may waste: a unit for each group.
    unit = -(-(limit - smallest(groups)) // 16)
    reachable = limit - unit * len(groups)
    if reachable >= smallest(groups):
        assert loss <= best(groups, reachable)[0] + 1e-12


def test_layers_of_a_large_net_are_solved_exactly():
    """150 layers of 6 options: greedy improvement by any one layer, or by any two, finds nothing better."""
    rng = random.Random(0)
    groups = []
    for layer in range(150):
        numel = 384 * 384 * (1, 3, 4, 4)[layer % 4]
        weight = rng.uniform(0.1, 2.0)
        groups.append([(numel * bits // 8, weight * 4.0**-bits * rng.uniform(0.5, 1.5)) for bits in (2, 3, 4, 5, 6, 8)])
    limit = 2 * smallest(groups)
    chosen = least_loss(groups, limit)
    loss, size = value(groups, chosen)
    assert size <= limit
    for a, b in itertools.combinations(range(len(groups)), 2):
        fixed_loss = loss - groups[a][chosen[a]][1] - groups[b][chosen[b]][1]
        free = limit - size + groups[a][chosen[a]][0] + groups[b][chosen[b]][0]
        pairs = (x[1] + y[1] for x in groups[a] for y in groups[b] if x[0] + y[0] <= free)
        assert fixed_loss + min(pairs) >= loss - 1e-12
