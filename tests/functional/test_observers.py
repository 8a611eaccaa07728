"""Ranges over several batches. Oracle: closed forms, torch.quantile, numpy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat.functional import observers
from tests.tiny import randn

BATCHES = [randn(4, 5, 6, seed=s) * (1 + s) for s in (0, 2, 1)]


def seen(method, axis, batches=BATCHES):
    state = None
    for x in batches:
        state = F.observe(state, x, axis, method)
    return state


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("method", ["minmax", "omse", "mse", "mse_ends", "ptf"])
def test_outermost_ends_of_all_batches(method, axis):
    expected = F.min_max(torch.stack(BATCHES, 0).movedim(0, -1), -2 if axis == -1 else axis)
    assert_close(tuple(seen(method, axis)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", observers.OBSERVERS)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_nan_in_any_batch_stays(method, bad):
    batches = [x.clone() for x in BATCHES]
    batches[bad][0, 0, 0] = torch.nan
    assert seen(method, None, batches).low.isnan().all()


@pytest.mark.parametrize("q", [0.0, 1e-5, 0.3, 0.99999, 1.0])
def test_quantile_of_long_rows(q, monkeypatch):
    rows = randn(3, 1001)
    expected = np.quantile(rows.double().numpy(), q, axis=1)
    # torch.quantile has ranks in float32, 1e-4 of the way to the next value; ours are in float64.
    for longest, tolerance in ((observers.MAX_QUANTILE_VALUES, 1e-4), (1000, 1e-6)):
        monkeypatch.setattr(observers, "MAX_QUANTILE_VALUES", longest)
        assert_close(
            observers.quantiles(rows, q, 0.5)[0].double(),
            torch.from_numpy(expected),
            rtol=tolerance,
            atol=1e-6,
        )
