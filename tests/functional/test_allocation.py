"""Assignments of bits. Oracle: all of them, enumerated; worked examples."""

import itertools

import pytest
import torch

from qat.functional.allocation import (
    assigned_bytes,
    average_bits,
    brood,
    filled,
    front,
    greedy_path,
    lowered,
    mutated,
    rises,
    single_steps,
    spread,
)
from qat.functional.packing import packed_bytes

NUMELS, CHOICES = (100, 33, 7, 64), (2, 3, 8)
EVERYTHING = list(itertools.product(CHOICES, repeat=len(NUMELS)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_codes_are_packed_and_a_rest_fills_a_byte():
    assert [packed_bytes(n, 3) for n in (8, 9, 1, 0)] == [3, 4, 1, 0]
    assert assigned_bytes((8, 9), (2, 3)) == 2 + 4
    assert average_bits((30, 10), (2, 6)) == 3.0


def test_nothing_beats_a_point_of_the_front():
    generator = seeded(0)
    sizes, losses = (torch.randint(12, (60,), generator=generator).tolist() for _ in range(2))
    kept = front(sizes, losses)

    def beaten(i):
        as_good = [j for j in range(60) if sizes[j] <= sizes[i] and losses[j] <= losses[i]]
        return any((sizes[j], losses[j]) != (sizes[i], losses[i]) or j < i for j in as_good)

    assert sorted(kept) == [i for i in range(60) if not beaten(i)]
    assert [sizes[i] for i in kept] == sorted(sizes[i] for i in kept)
    assert len(kept) > 2


@pytest.mark.parametrize(
    ("n", "count", "always", "expected"),
    [
        (7, 3, 0, [0, 3, 6]),
        (7, 3, 5, [0, 5, 6]),
        (7, 2, 5, [0, 5]),
        (7, 1, 5, [5]),
        (3, 8, 1, [0, 1, 2]),
        (5, 0, 1, []),
    ],
)
def test_some_points_of_many(n, count, always, expected):
    assert spread(n, count, always) == expected


def test_single_steps_change_one_layer():
    steps = single_steps((2, 3), (2, 3, 8))
    assert steps == [(3, 3), (8, 3), (2, 2), (2, 8)]


def test_a_rise_is_never_negative_and_never_falls_with_fewer_bits():
    # 0.9 at two bits and 1.3 at three are noise.
    assert rises(1.0, [[0.9, 1.3, 1.0], [3.0, 0.5, 1.0]]) == [pytest.approx([0.3, 0.3, 0.0]), [2.0, 0.0, 0.0]]


def test_every_point_of_the_greedy_path_is_the_best_of_its_size():
    """Where the price of a byte only grows as a layer gets fewer bits, greedy is exact. Oracle: all assignments."""
    numels, choices = (80, 80, 80), (2, 4, 6)
    table = [[9.0, 2.0, 0.0], [5.0, 1.0, 0.0], [1.0, 0.25, 0.0]]

    def total(bits):
        return sum(row[choices.index(b)] for row, b in zip(table, bits, strict=True))

    path = greedy_path(numels, choices, table)
    assert (path[0], path[-1], len(path)) == ((6, 6, 6), (2, 2, 2), 7)
    for bits in path:
        size = assigned_bytes(numels, bits)
        assert total(bits) == min(total(b) for b in itertools.product(choices, repeat=3) if assigned_bytes(numels, b) <= size)


def test_a_path_skips_a_width_that_is_worth_nothing():
    # Three bits cost the first layer as much as two.
    assert greedy_path((8, 8), (2, 3, 8), [[1.0, 1.0, 0.0], [9.0, 7.0, 0.0]]) == [(8, 8), (2, 8), (2, 3), (2, 2)]


@pytest.mark.parametrize("limit", [52, 60, 77, 100, 153, 204, 500])
def test_what_is_fitted_fits(limit):
    for bits in EVERYTHING:
        order = torch.randperm(4, generator=seeded(sum(bits))).tolist()
        low = lowered(bits, NUMELS, CHOICES, limit, order)
        full = filled(low, NUMELS, CHOICES, limit, order)
        assert assigned_bytes(NUMELS, low) <= assigned_bytes(NUMELS, full) <= limit
        assert low == bits or assigned_bytes(NUMELS, bits) > limit
        assert set(low) | set(full) <= set(CHOICES)


def test_who_gives_way_first_and_who_gets_what_is_left():
    # 52 bytes with 2 bits everywhere, 204 with 8.
    assert lowered((8, 8, 8, 8), NUMELS, CHOICES, 150, [0, 1, 2, 3]) == (3, 8, 8, 8)
    assert lowered((8, 8, 8, 8), NUMELS, CHOICES, 150, [3, 2, 1, 0]) == (8, 3, 3, 3)
    assert lowered((8, 8, 8, 8), NUMELS, CHOICES, 52, [3, 2, 1, 0]) == (2, 2, 2, 2)
    # What is left may be too little for one layer and enough for the next.
    assert filled((8, 3, 3, 3), NUMELS, CHOICES, 150, [3, 2, 1, 0]) == (8, 3, 8, 3)
    assert filled((2, 2, 2, 2), NUMELS, CHOICES, 64, [3, 0, 1, 2]) == (2, 3, 2, 3)
    assert filled((2, 2, 2, 2), NUMELS, CHOICES, 500, [0, 1, 2, 3]) == (3, 3, 3, 3)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_child_differs_in_some_layers(most):
    parent, choices, counts, steps = (2, 3, 8, 3), (2, 3, 4, 8), set(), set()
    for seed in range(100):
        child, order = mutated(parent, choices, most, seeded(seed))
        changed = [i for i in range(4) if child[i] != parent[i]]
        assert 1 <= len(changed) <= most
        assert sorted(order) == [0, 1, 2, 3]
        assert set(order[-len(changed) :]) == set(changed)
        assert (child, order) == mutated(parent, choices, most, seeded(seed))
        counts.add(len(changed))
        steps |= {choices.index(child[i]) - choices.index(parent[i]) for i in changed}
    assert counts == set(range(1, min(most, 4) + 1))
    assert steps == {-3, -2, -1, 1, 2, 3}


def test_children_are_new_and_differ():
    made = iter([(1,), (2,), (2,), (3,), (4,)])
    assert brood(lambda: next(made), {(1,)}.__contains__, 2) == [(2,), (3,)]
    assert brood(lambda: (1,), {(1,)}.__contains__, 2) == []
