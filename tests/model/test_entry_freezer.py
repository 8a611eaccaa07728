"""Entries that an optimizer must not change. Oracles: the same step on a parameter that is not frozen, and bit equality."""

import pytest
import torch
from torch import nn

from qat.model.entry_freezer import EntryFreezer
from tests.tiny import randn


def start(optimizer="adamw", **settings):
    parameter = nn.Parameter(randn(6, 5))
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    return parameter, make([parameter], lr=0.1, weight_decay=0.3, **settings)


def gradient(t):
    return randn(6, 5, seed=100 + t)


MASK = torch.arange(30).reshape(6, 5) % 3 > 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_held_entries_stay_and_the_others_move_as_ever(optimizer):
    settings = {"momentum": 0.9} if optimizer == "sgd" else {}
    (held, ours), (free, theirs) = start(optimizer, **settings), start(optimizer, **settings)
    hold = EntryFreezer()
    hold.attach([ours])
    for t in range(4):
        held.grad, free.grad = gradient(t), gradient(t)
        before = held.detach().clone()
        if t:  # the first step builds momentum
            hold.freeze([(held, MASK)])
        ours.step()
        theirs.step()
        if t:
            assert torch.equal(held[MASK], before[MASK])
        assert torch.equal(held[~MASK], free[~MASK])
    assert not torch.isclose(held[MASK], free[MASK]).any()


def test_a_gradient_that_is_no_number_does_not_get_through():
    parameter, optimizer = start()
    hold = EntryFreezer()
    hold.attach([optimizer])
    parameter.grad = torch.where(MASK, torch.nan, gradient(0))
    hold.freeze([(parameter, MASK)])
    assert torch.equal(parameter.grad[MASK], torch.zeros(MASK.sum()))
    optimizer.step()
    assert parameter.isfinite().all()
    assert all(v.isfinite().all() for v in optimizer.state[parameter].values())


def test_a_step_that_a_scaler_skips_leaves_nothing_behind():
    # The values remembered for the skipped step are not those of the next one.
    calls = []
    parameter, optimizer = start()
    hold = EntryFreezer(on_restore=lambda: calls.append(1))
    hold.attach([optimizer])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for t, good in enumerate([True, False, True]):
        optimizer.zero_grad()
        loss = (parameter * gradient(t)).sum() * (1.0 if good else torch.inf)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        mask = MASK if t < 2 else ~MASK
        before = parameter.detach().clone()
        hold.freeze([(parameter, mask)])
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(parameter[mask], before[mask])
        assert bool((parameter[~mask] != before[~mask]).all()) == good
    assert len(calls) == 2
