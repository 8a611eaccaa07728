"""Oscillations and freezing. Oracles: sequences by hand."""

import pytest
import torch

from qat import functional as F
from qat.functional.oscillation import cosine_between


def freeze(rows, threshold, momentum=0.25):
    """Codes in force at every look, and the final state."""
    state = frozen = None
    out = []
    for raw in rows:
        codes = F.replace_frozen(frozen, torch.tensor([raw]))
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
    # Means before each update: 3, 3, 3, 2.75. The turn at the fourth freezes 3; the code is 2.
    out, state = freeze([3, 3, 2, 3, 2, 2, 2], 0.2)
    assert out == [3, 3, 2, 3, 3, 3, 3]
    assert state.codes.item() == 3


def test_a_threshold_of_zero_freezes_nothing():
    out, state = freeze([0, 1, 0, 1], 0.0)
    assert (out, state) == ([0, 1, 0, 1], None)


@pytest.mark.parametrize(
    ("progress", "value"), [(0, 2.0), (0.5, 1.25), (1, 0.5), (1.5, 0.5), (1 / 3, 1.625)]
)
def test_cosine(progress, value):
    assert cosine_between(2.0, 0.5, progress) == pytest.approx(value)
