"""Straight-through estimators. Oracle: closed forms."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat.functional.ste import code_dtype, group_size, sum_along
from tests.tiny import randn


def test_round_ste_is_exact_and_passes_the_gradient():
    x = torch.tensor([0.1, 0.5, 1.5, -0.5, 1e8 + 1, 3.3e-5], requires_grad=True)
    out = F.round_ste(x)
    out.backward(torch.arange(6.0))
    assert torch.equal(out, x.round())
    assert torch.equal(x.grad, torch.arange(6.0))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
def test_sums_and_means_along_any_axis(axis):
    x = randn(2, 3, 4, 5)
    others = [d for d in range(4) if d != axis % 4]
    assert_close(sum_along(x, axis), x.sum(others))
    assert_close(F.mean_abs(x, axis), x.abs().mean(others))
    assert group_size(x, axis) == 120 // x.shape[axis]
    assert F.view_along(F.mean_abs(x, axis), 4, axis).shape == tuple(
        1 if d in others else x.shape[d] for d in range(4)
    )


@pytest.mark.parametrize(
    ("bounds", "dtype"),
    [
        ((-128, 127), torch.int8),
        ((0, 127), torch.int8),
        ((0, 255), torch.int16),
        ((0, 65535), torch.int32),
    ],
)
def test_smallest_dtype_that_holds_the_codes(bounds, dtype):
    assert code_dtype(*bounds) == dtype
