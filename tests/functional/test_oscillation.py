"""Oscillations and freezing. Oracles: sequences by hand, the exact tracker for the packed one, the error bound it promises."""

import pytest
import torch

from qat import functional as F
from qat.functional.oscillation import LOWEST_FREQUENCY, cosine_between


def track(rows, momentum=0.25):
    """State after looks at single codes."""
    state = None
    for codes in rows:
        state = F.oscillation_step(state, torch.tensor([codes], dtype=torch.int8), momentum)
    return state


@pytest.mark.parametrize(
    ("codes", "flips", "direction", "frequency"),
    [
        ([3], 0, 0, 0.0),
        ([0, 1], 0, -1, 0.0),
        ([0, 1, 0], 1, 1, 0.25),
        ([0, 1, 0, 0], 1, 1, 0.1875),
        ([0, 1, 1, 0], 1, 1, 0.25),  # a pause does not hide the turn
        ([0, 1, 2, 3], 0, -1, 0.0),
        ([0, 1, 0, 1, 0], 3, 1, 0.25 + 0.75 * (0.25 + 0.75 * 0.25)),
        ([-2, 1, -2], 1, 1, 0.25),  # by more than one level
    ],
)
def test_sequences(codes, flips, direction, frequency):
    state = track(codes)
    assert (state.flips.item(), state.direction.item(), state.frequency.item()) == (flips, direction, frequency)
    assert state.codes.item() == codes[-1]
    assert {t.dtype for t in state} == {torch.float32}


def freeze(rows, threshold, momentum=0.25):
    """Codes in force at every look, and the final state."""
    state = frozen = None
    out = []
    for raw in rows:
        codes = F.with_frozen(frozen, torch.tensor([raw]))
        state = F.oscillation_step(state, codes, momentum)
        frozen = F.freezing_step(frozen, codes, state.frequency, threshold, momentum)
        out.append(codes.item())
    return out, frozen


def test_freezing_takes_effect_at_the_next_look():
    # The first turn is at the third look: mean of the codes before it is 0.25 -> 0, in force from the fourth on.
    out, state = freeze([0, 1, 0, 1, 1, 1], 0.2)
    assert out == [0, 1, 0, 0, 0, 0]
    assert (state.frozen.item(), state.codes.item()) == (True, 0)


def test_the_integer_is_the_rounded_mean():
    # Means before the looks: 3, 3, 3, 2.75 -> the turn at the fourth look freezes at 3 although the code is 2.
    out, state = freeze([3, 3, 2, 3, 2, 2, 2], 0.2)
    assert out == [3, 3, 2, 3, 3, 3, 3]
    assert state.codes.item() == 3


def test_a_threshold_of_zero_freezes_nothing():
    out, state = freeze([0, 1, 0, 1], 0.0)
    assert (out, state) == ([0, 1, 0, 1], None)


def test_below_the_threshold_nothing_is_frozen():
    out, state = freeze([0, 1, 0, 0, -1, -2], 0.25)  # the frequency reaches 0.25 and is not above it
    assert out == [0, 1, 0, 0, -1, -2]
    assert not state.frozen.item()


def test_frozen_for_ever():
    out, state = freeze([0, 1, 0] + [1] * 50, 0.2)
    assert out[3:] == [0] * 50
    assert state.frozen.item()


@pytest.mark.parametrize(("progress", "value"), [(0, 2.0), (0.5, 1.25), (1, 0.5), (1.5, 0.5), (1 / 3, 1.625)])
def test_cosine(progress, value):
    assert cosine_between(2.0, 0.5, progress) == pytest.approx(value)


def random_codes(steps, entries=4000):
    """Codes that flip, each at a rate of its own; from two thirds on hardly any."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(entries, generator=generator) ** 4
    codes = torch.randint(-8, 7, (entries,), generator=generator)
    base = codes.clone()
    for t in range(steps):
        flips = torch.rand(entries, generator=generator) < rate * (1 if t < 2 * steps / 3 else 0.002)
        codes = torch.where(flips, 2 * base + 1 - codes, codes)
        yield codes.to(torch.int8)


@pytest.mark.parametrize("momentum", [0.0005, 0.01, 0.05, 0.3])
def test_packed_in_three_bytes_within_its_bound(momentum):
    exact = packed = None
    highest = torch.zeros(4000)
    worst = 0.0
    for codes in random_codes(600):
        exact = F.oscillation_step(exact, codes, momentum)
        before = None if packed is None else F.unpack_oscillation(packed, momentum)
        packed = F.pack_oscillation(F.oscillation_step(before, codes, momentum), momentum)
        found = F.unpack_oscillation(packed, momentum)
        assert torch.equal(found.codes, exact.codes)
        assert torch.equal(found.direction, exact.direction)
        highest = torch.maximum(highest, exact.frequency)
        error = (found.frequency - exact.frequency).abs()
        bound = highest.square() * (F.packing_error(1.0, momentum) - F.packing_error(0.0, momentum)) + F.packing_error(0.0, momentum)
        assert (error <= bound + 1e-6).all()
        worst = max(worst, error.max().item())
    assert worst > 0  # it is not simply exact
    assert sum(t.element_size() * t.numel() for t in packed) == 3 * 4000


def test_the_bound_is_small_where_it_matters():
    # At frequencies up to 0.1 the error stays far below the common cut of 0.005.
    assert F.packing_error(0.1, 0.01) < 0.005 / 10


def test_a_decay_is_exact():
    momentum = 0.01
    state = F.OscillationState(*(torch.tensor([v]) for v in (2.0, 1.0, 1.0, 0.0)))
    packed = F.pack_oscillation(state, momentum)
    for t in range(1, 900):
        packed = F.pack_oscillation(F.oscillation_step(F.unpack_oscillation(packed, momentum), torch.tensor([2]), momentum), momentum)
        assert F.unpack_oscillation(packed, momentum).frequency.item() == pytest.approx(0.99**t, rel=1e-5)
    for _ in range(100):
        packed = F.pack_oscillation(F.oscillation_step(F.unpack_oscillation(packed, momentum), torch.tensor([2]), momentum), momentum)
    assert LOWEST_FREQUENCY > 0.99**999
    assert F.unpack_oscillation(packed, momentum).frequency.item() == 0


def test_codes_of_eight_bits_fit():
    codes = torch.arange(-128, 128)
    packed = F.pack_oscillation(F.oscillation_step(None, codes, 0.01), 0.01)
    assert torch.equal(F.unpack_oscillation(packed, 0.01).codes, codes.float())
