"""Bookkeeping of the search. Oracle: the rules written out on lists; see test_ptq_goldens.py for the reference's own runs."""

import math

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.functional import evolution
from qat.functional.evolution import Draw, Population

SCALES = torch.tensor([0.1, 0.2, 0.3])


def population(*losses):
    """Candidates whose entries are their position."""
    rows = torch.arange(float(len(losses))).double().reshape(-1, 1).repeat(1, 2)
    return Population(rows, torch.tensor(losses, dtype=torch.float64))


def names(state):
    return state.scales[:, 0].tolist()


def search(seed, cycles, state, block=0):
    """`cycles` of a search for the origin, from a cycle on."""
    for cycle in cycles:
        drawn = evolution.draw(seed, (0, block, cycle), state.scales.shape[1], 0.05)
        child = evolution.evolved_child(state, drawn)
        state = evolution.insert(state, child, child.square().sum().item()).population
    return state


def start():
    return evolution.initial_population(SCALES, SCALES.square().sum().item())


def test_population_begins_with_copies_of_the_incumbent():
    state = evolution.initial_population(SCALES.requires_grad_(), 2.5)
    assert state.scales.shape == (15, 3)
    assert not state.scales.requires_grad
    assert torch.equal(state.scales, SCALES.detach().double().expand(15, 3))
    assert state.losses.tolist() == [2.5] * 15
    assert evolution.best(state)[1] == 2.5


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_an_incumbent_without_a_loss_is_an_error(loss):
    with pytest.raises(qat.UsageError, match=f"incumbent_loss={loss}: must be a finite number"):
        evolution.initial_population(SCALES, loss)


def test_parent_is_the_best_of_the_tournament_not_of_all():
    state = population(1.0, 2.0, 3.0, 4.0)
    assert evolution.select_parent(state, torch.tensor([3, 2, 3])).tolist() == [2, 2]
    assert evolution.select_parent(state, torch.tensor([1, 0])).tolist() == [0, 0]


def test_mutation():
    parent, noise = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([0.5, -0.25, -0.3])
    assert_close(evolution.mutate(parent, noise), torch.tensor([1.5, 0.75, 0.2]))
    assert_close(evolution.mutate(parent, noise, relative=True), torch.tensor([1.5, 0.75, 0.07]))


def test_a_child_is_a_mutation_of_the_winner():
    state = Population(torch.tensor([[1.0], [2.0]]).double(), torch.tensor([0.1, 0.2]).double())
    drawn = Draw(torch.tensor([1, 1]), torch.tensor([0.5]).double())
    assert evolution.evolved_child(state, drawn).tolist() == [2.5]
    assert evolution.evolved_child(state, drawn, relative=True).tolist() == [3]


@pytest.mark.parametrize(
    ("loss", "order", "outcome"),
    [
        (0.5, [9, 0, 1], "best"),
        (1.5, [0, 9, 1], "kept"),
        (2.0, [0, 1, 9], "kept"),
        (4.0, [0, 1, 2], "dropped"),
        (5.0, [0, 1, 2], "dropped"),
    ],
)
def test_insertion(loss, order, outcome):
    after = evolution.insert(population(1.0, 2.0, 4.0), torch.full((2,), 9.0), loss)
    assert names(after.population) == order
    assert after.population.losses.tolist() == sorted([1.0, 2.0, 4.0, loss])[:3]
    assert after.outcome == outcome


def test_deviates_from_reference_equal_losses():
    # There tuples are compared, and equal losses of different arrays raise an error.
    state = population(1.0, 1.0, 1.0)
    assert evolution.select_parent(state, torch.tensor([2, 1, 0])).tolist() == [2, 2]
    after = evolution.insert(state, torch.full((2,), 9.0), 1.0)
    assert names(after.population) == [0, 1, 2]
    assert after.outcome == "dropped"
    assert evolution.best(after.population)[0].tolist() == [0, 0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_child_without_a_loss_is_never_accepted(loss):
    state = population(1.0, 2.0)
    after = evolution.insert(state, torch.full((2,), 9.0), loss)
    assert after.population is state
    assert after.outcome == "not finite"


def test_a_flat_landscape_keeps_the_incumbent():
    state = start()
    loss = state.losses[0].item()
    for cycle in range(5):
        child = evolution.evolved_child(state, evolution.draw(0, (0, 0, cycle), 3, 0.1))
        state = evolution.insert(state, child, loss).population
    assert torch.equal(evolution.best(state)[0], SCALES.double())


def test_best_loss_never_rises_and_ends_lower():
    state, losses = start(), []
    for cycle in range(60):
        state = search(3, [cycle], state)
        losses.append(evolution.best(state)[1])
        assert len(state.losses) == 15
        assert (state.losses.diff() >= 0).all()
        assert_close(state.scales.square().sum(1), state.losses)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * SCALES.square().sum()


def test_a_search_goes_on_from_its_population_alone(tmp_path):
    whole = search(7, range(12), start())
    torch.save(search(7, range(5), start())._asdict(), tmp_path / "state.pt")
    half = Population(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert_close(tuple(search(7, range(5, 12), half)), tuple(whole), rtol=0, atol=0)


def test_draws_are_functions_of_seed_and_place():
    drawn = evolution.draw(1, (2, 3, 4), 50, 0.1)
    torch.manual_seed(5)
    again = evolution.draw(1, (2, 3, 4), 50, 0.1)
    assert torch.equal(drawn.noise, again.noise)
    assert torch.equal(drawn.members, again.members)
    others = [(2, (2, 3, 4)), (1, (3, 3, 4)), (1, (2, 4, 4)), (1, (2, 3, 5)), (1, (3, 2, 4))]
    assert all(not torch.equal(evolution.draw(seed, place, 50, 0.1).noise, drawn.noise) for seed, place in others)


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    evolution.draw(1, (0, 0, 0), 5, 0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_uniform():
    drawn = evolution.draw(0, (0, 0, 0), 20_000, 0.5, size=4, tournament=8000)
    assert drawn.noise.dtype == torch.float64
    assert -0.5 <= drawn.noise.min() < -0.49
    assert 0.49 < drawn.noise.max() < 0.5
    assert abs(drawn.noise.mean()) < 0.01  # 5 standard errors
    assert drawn.noise.var().item() == pytest.approx(1 / 12, rel=0.05)
    counts = drawn.members.bincount(minlength=4)
    assert counts.shape == (4,)
    assert (counts - 2000).abs().max() < 200  # 5 standard errors
    few = evolution.draw(0, (0, 0, 0), 2, 0.5)
    assert few.members.shape == (10,)
    assert few.members.max() < 15


@pytest.mark.parametrize(("bits", "radius"), [(2, 1e-3), (3, 1e-3), (4, 1e-3), (8, 1e-4)])
def test_noise_radius(bits, radius):
    assert evolution.noise_radius(bits) == radius
