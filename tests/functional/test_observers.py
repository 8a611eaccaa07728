"""Ranges over several batches. Oracle: closed forms, torch.quantile, numpy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import qat
from qat import functional as F
from qat.functional import observers


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [randn(4, 5, 6, seed=s) * (1 + s) for s in range(3)]


def seen(method, axis, batches=BATCHES, **options):
    state = None
    for x in batches:
        state = F.observe(state, x, axis, method, **options)
    return state


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("method", ["minmax", "omse", "mse", "ptf"])
def test_outermost_ends_of_all_batches(method, axis):
    expected = F.min_max(torch.stack(BATCHES, 0).movedim(0, -1), -2 if axis == -1 else axis)
    assert_close(tuple(seen(method, axis)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("axis", [1, None])
def test_moving_average(axis):
    (a, b), (c, d), _ = (F.min_max(x, axis) for x in BATCHES)
    low, high = seen("ema", axis, BATCHES[:1])
    assert torch.equal(low, a)
    assert torch.equal(high, b)
    low, high = seen("ema", axis, BATCHES[:2])
    assert_close((low, high), (0.99 * a + 0.01 * c, 0.99 * b + 0.01 * d))
    low, high = seen("ema", axis, BATCHES[:2], momentum=0.5)
    assert_close((low, high), ((a + c) / 2, (b + d) / 2))


def test_percentile_is_a_moving_average_of_quantiles():
    ends = [[torch.quantile(x, q).reshape(1) for x in BATCHES[:2]] for q in (1 - 0.99999, 0.99999)]
    assert_close(tuple(seen("percentile", None, BATCHES[:2])), tuple(0.99 * a + 0.01 * b for a, b in ends))


def test_percentile_leaves_out_rare_values():
    x = torch.cat([torch.linspace(-1, 1, 300_000), torch.tensor([-50.0, 50.0])])
    low, high = F.observe(None, x, None, "percentile")
    assert_close((low, high), (torch.tensor([-1.0]), torch.tensor([1.0])), rtol=0, atol=1e-4)


def test_percentile_per_slice():
    state = F.observe(None, BATCHES[0], -1, "percentile")
    for channel in range(6):
        alone = F.observe(None, BATCHES[0][..., channel], None, "percentile")
        assert_close((state.low[channel], state.high[channel]), (alone.low[0], alone.high[0]))


@pytest.mark.parametrize("method", observers.OBSERVERS)
@pytest.mark.parametrize("axis", [-1, None])
def test_an_empty_range_is_no_batch(method, axis):
    empty = observers.empty_range(1 if axis is None else 6)
    state = F.observe(empty, BATCHES[0], axis, method)
    assert_close(tuple(state), tuple(seen(method, axis, BATCHES[:1])), rtol=0, atol=0)
    low, high = F.RangeState(*(torch.stack(pair) for pair in zip(empty, state, strict=True)))
    assert torch.equal(low.amin(0), state.low)  # as processes without a batch join the others
    assert torch.equal(high.amax(0), state.high)


@pytest.mark.parametrize("method", observers.OBSERVERS)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_nan_in_any_batch_stays(method, bad):
    batches = [x.clone() for x in BATCHES]
    batches[bad][0, 0, 0] = torch.nan
    assert seen(method, None, batches).low.isnan().all()


@pytest.mark.parametrize("method", observers.METHODS)
@pytest.mark.parametrize("signed", [True, False])
def test_one_batch_is_affine_scale(method, signed):
    x = BATCHES[0]
    found = F.affine_from_state(F.observe(None, x, -1, method), x, 4, signed=signed, axis=-1, method=method)
    assert_close(found, F.affine_scale(x, 4, signed, -1, method), rtol=0, atol=0)
    assert all(t.shape == (6,) and t.dtype == torch.float32 for t in found)


def test_errors_are_those_of_the_last_batch():
    wide = torch.tensor([-1.0, 4.0])
    x = torch.linspace(-0.5, 0.5, 50)
    state = F.observe(F.observe(None, wide, None, "omse"), x, None, "omse")
    scale, _ = F.affine_from_state(state, x, 4, signed=False, axis=None, method="omse")
    # The lower end has to reach -0.5 about; shrinking for the first batch would have kept the upper end.
    assert scale < 0.5 * F.affine_from_range(*state, 4, signed=False)[0]
    swapped, _ = F.affine_from_state(state, wide, 4, signed=False, axis=None, method="omse")
    assert swapped > 0.9 * F.affine_from_range(*state, 4, signed=False)[0]


@pytest.mark.parametrize("q", [0.0, 1e-5, 0.3, 0.99999, 1.0])
def test_quantile_of_long_rows(q, monkeypatch):
    rows = randn(3, 1001)
    expected = np.quantile(rows.double().numpy(), q, axis=1)
    # torch.quantile has ranks in float32, 1e-4 of the way to the next value; ours are in float64.
    for longest, tolerance in ((observers.LONGEST_ROW, 1e-4), (1000, 1e-6)):
        monkeypatch.setattr(observers, "LONGEST_ROW", longest)
        assert_close(observers.quantiles(rows, q, 0.5)[0].double(), torch.from_numpy(expected), rtol=tolerance, atol=1e-6)


def test_quantile_of_long_rows_passes_a_nan_on(monkeypatch):
    monkeypatch.setattr(observers, "LONGEST_ROW", 10)
    rows = randn(2, 50)
    rows[1, 7] = torch.nan
    assert observers.quantiles(rows, 0.1, 0.2).isnan().tolist() == [[False, True]] * 2


def test_percentile_of_more_values_than_float32_counts():
    n = 2**24 + 300_001
    x = torch.arange(n, dtype=torch.float32).mul_(2.0**-20).flip(0)
    low, high = F.observe(None, x, None, "percentile")
    assert_close((low, high), (torch.tensor([n * 2.0**-20 * 1e-5]), torch.tensor([n * 2.0**-20 * 0.99999])), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "allowed"),
    [
        (lambda: F.observe(None, BATCHES[0], None, "median"), "minmax, percentile, omse, mse, ptf, ema"),
        (lambda: F.affine_scale(BATCHES[0], 4, True, None, "ema"), "minmax, percentile, omse, mse, ptf$"),
        (lambda: F.affine_from_state(seen("ema", None), BATCHES[0], 4, signed=True, axis=None, method="last"), "minmax, .*, ema"),
    ],
)
def test_unknown_method(call, allowed):
    with pytest.raises(qat.UsageError, match=f"method='\\w+': must be one of {allowed}"):
        call()
