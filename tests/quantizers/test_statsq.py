"""StatsQ of activations. Oracle: the pure function on rows."""

import pytest
import torch

from qat import functional as F
from qat.quantizers import ActStatsQ
from tests.quantizers.common import allocated
from tests.tiny import randn


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, None])
def test_activations_are_rows_along_the_axis(axis):
    x = randn(4, 5, 6)
    made = allocated("statsq", x, bits=3, axis=axis)
    assert isinstance(made, ActStatsQ)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    y = made(x)
    y = y.reshape(1, -1) if axis is None else y.movedim(axis, 0).flatten(1)
    torch.testing.assert_close(y, F.statsq(rows, 3))
    scale = F.view_along(2 * F.mean_abs(x, axis), 3, axis)
    assert torch.equal(made(x), (made.codes(x).float() + 0.5) / 4 * scale)


@pytest.mark.parametrize("axis", [1, 2, -2, None])
def test_on_thresholds_the_last_bit_of_the_scale_decides(axis):
    x = randn(3, 7, 5).sign() * 0.7
    made = allocated("statsq", x, bits=2, axis=axis)
    scale = F.view_along(2 * F.mean_abs(x, axis), 3, axis)
    assert torch.equal(made(x), (made.codes(x).float() + 0.5) / 2 * scale)
