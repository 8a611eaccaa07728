"""Mean and spread of quantized weights. Oracle: the moments themselves."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from tests.tiny import randn


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 40), 0), ((5, 3, 4, 4), 0), ((40, 6), 1), ((40, 6), -1)]
)
def test_every_channel_has_the_moments_of_its_weight(shape, axis):
    w = randn(*shape) + 0.3
    quantized = F.fake_quantize_affine(w, *F.affine_scale(w, 2, False, axis), 0, 3, axis)
    out = F.correct_mean_and_std(quantized, w, axis)
    rows, expected, before = (t.movedim(axis, 0).flatten(1) for t in (out, w, quantized))
    assert_close(rows.mean(1), expected.mean(1), rtol=1e-5, atol=1e-6)
    assert_close(rows.std(1), expected.std(1))
    assert ((before.std(1) - expected.std(1)).abs() > 1e-3).any()


def test_a_channel_without_spread_takes_the_mean():
    w = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])
    assert_close(F.correct_mean_and_std(torch.zeros(2, 3), w), torch.tensor([[0.2] * 3, [2.0] * 3]))


def test_a_channel_of_one_element_takes_its_weight():
    w = torch.tensor([[0.3], [-2.0]])
    assert torch.equal(F.correct_mean_and_std(torch.tensor([[0.5], [-1.5]]), w), w)
