"""Scales from a search. Oracle: a loop over all candidates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qat import functional as F
from qat.functional.observers import affine_error

SEEDS = st.integers(0, 2**31)
AXES = st.sampled_from([0, 1, -1, None])


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(shape[-1], generator=generator) * 3


def errors(x, bits, signed, axis, method):
    """Mean squared error per slice."""
    scale, zero_point = F.affine_scale(x, bits, signed, axis, method)
    return affine_error(x, scale, zero_point, F.code_range(bits, signed=signed), axis, axis)


@given(SEEDS, st.sampled_from([2, 3, 4, 8]), st.booleans(), AXES)
@settings(max_examples=30, deadline=None)
def test_mse_is_never_worse_than_minmax_in_any_slice(seed, bits, signed, axis):
    x = randn(6, 5, 4, seed=seed)
    ends, common, minmax = (
        errors(x, bits, signed, axis, method) for method in ("mse_ends", "mse", "minmax")
    )
    assert (ends <= common).all()
    assert (common <= minmax).all()


def test_a_range_of_gelu_keeps_its_low_end():
    normal = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.gelu(normal)
    x[0, 0] = 6.0
    _, zero_point = F.affine_scale(x, 4, False, None, "mse_ends")
    _, common_zero_point = F.affine_scale(x, 4, False, None, "mse")
    assert (zero_point, common_zero_point) == (1, 0)
    assert errors(x, 4, False, None, "mse_ends") < 0.6 * errors(x, 4, False, None, "mse")


def test_a_far_value_is_cut_off_in_its_own_channel_alone():
    x = torch.linspace(-1, 1, 101).repeat(2, 1)
    x[0, 0] = 2.0
    scale, _ = F.affine_scale(x, 3, True, 0, "mse")
    assert_close(scale[1:], F.affine_scale(x[1:], 3, True, 0, "mse")[0])
    assert scale[0] < F.affine_scale(x, 3, True, 0)[0][0]
    shared, _ = F.affine_scale(x, 3, True, 0, "omse")
    ratio = shared / ((x.amax(1) - x.amin(1)) / 7)
    assert_close(ratio[0], ratio[1])


@pytest.mark.parametrize("method", ["omse", "mse", "mse_ends"])
@pytest.mark.parametrize("axis", [0, None])
def test_of_equal_errors_the_widest_range_wins(method, axis):
    # All zeros: every candidate is exact.
    scale, zero_point = F.affine_scale(torch.zeros(3, 4), 4, False, axis, method)
    assert (scale == torch.finfo(torch.float32).eps).all()
    assert (zero_point == 0).all()
    # Whole numbers that several ranges represent exactly: only factor 1 keeps both ends.
    x = torch.arange(4.0).repeat(3, 1)
    assert_close(F.affine_scale(x, 2, False, axis, method), F.affine_scale(x, 2, False, axis))


@pytest.mark.parametrize("method", ["minmax", "percentile", "omse", "mse", "mse_ends", "ptf"])
def test_no_number_makes_up_for_a_nan(method):
    x = randn(3, 8)
    x[1, 2] = torch.nan
    scale, _ = F.affine_scale(x, 4, False, 0, method)
    assert scale[1].isnan()
    if method in {"minmax", "percentile", "mse", "mse_ends"}:  # these treat every slice alone
        assert torch.equal(scale[[0, 2]], F.affine_scale(x[[0, 2]], 4, False, 0, method)[0])
