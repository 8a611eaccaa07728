"""Bookkeeping of the search. Oracle: the rules written out on lists; see test_ptq_goldens.py for the reference's own runs."""

import pytest
import torch

from qat.functional import evolution
from qat.functional.evolution import Population
from tests.tiny import identical


def population(*losses):
    """Candidates whose entries are their position."""
    rows = torch.arange(float(len(losses))).double().reshape(-1, 1).repeat(1, 2)
    return Population(rows, torch.tensor(losses, dtype=torch.float64))


def names(state):
    return state.scales[:, 0].tolist()


@pytest.mark.parametrize(
    ("loss", "order"),
    [(0.5, [9, 0, 1]), (1.5, [0, 9, 1]), (2.0, [0, 1, 9]), (4.0, [0, 1, 2]), (5.0, [0, 1, 2])],
)
def test_insertion(loss, order):
    after = evolution.insert_child(population(1.0, 2.0, 4.0), torch.full((2,), 9.0), loss)
    assert names(after) == order
    assert after.losses.tolist() == sorted([1.0, 2.0, 4.0, loss])[:3]


def test_deviates_from_reference_equal_losses():
    # There tuples are compared, and equal losses of different arrays raise an error.
    state = population(1.0, 1.0, 1.0)
    assert evolution.select_parent(state, torch.tensor([2, 1, 0])).tolist() == [2, 2]
    after = evolution.insert_child(state, torch.full((2,), 9.0), 1.0)
    assert names(after) == [0, 1, 2]
    assert evolution.best_candidate(after)[0].tolist() == [0, 0]


def test_draws_are_functions_of_seed_and_place():
    drawn = evolution.draw(1, (2, 3, 4), 50, 0.1)
    torch.manual_seed(5)
    again = evolution.draw(1, (2, 3, 4), 50, 0.1)
    assert identical(drawn, again)
    others = [(2, (2, 3, 4)), (1, (3, 3, 4)), (1, (2, 4, 4)), (1, (2, 3, 5)), (1, (3, 2, 4))]
    assert all(
        not torch.equal(evolution.draw(seed, place, 50, 0.1).noise, drawn.noise)
        for seed, place in others
    )
