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
    on_thresholds = x.sign() * 0.7  # where the last bit of the scale decides
    for values in (x, on_thresholds):
        scale = F.view_along(2 * F.mean_abs(values, axis), 3, axis)
        assert torch.equal(made(values), (made.codes(values).float() + 0.5) / 4 * scale)
