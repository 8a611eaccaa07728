"""Learnable offsets. Oracle: q(x + a) + c written out."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from tests.quantizers.common import allocated, calibrated, randn


def shifted(x, offsets="both", **spec):
    """Calibrated around nonzero offsets."""
    made = allocated("lsq", x, offsets=offsets, **spec)
    with torch.no_grad():
        for parameter in (made.offset_before, made.offset_after):
            if parameter is not None:
                parameter.copy_(randn(*parameter.shape, seed=7))
    made.calibrate(x, {})
    return made


@pytest.mark.parametrize(("offsets", "names"), [("none", {"scale"}), ("before", {"offset_before", "quantizer.scale"})])
def test_only_the_offsets_asked_for_exist(offsets, names):
    assert set(allocated("lsq", randn(2, 3, 4), offsets=offsets).state_dict()) == names


def test_offsets_start_at_zero():
    x = randn(2, 3, 4)
    made = calibrated("lsq", x, axis=-2, offsets="both")
    assert made.offset_before.abs().sum() == made.offset_after.abs().sum() == 0
    assert torch.equal(made(x), calibrated("lsq", x, axis=-2)(x))


@pytest.mark.parametrize(("ndim", "shape"), [(1, (5,)), (2, (4, 5))])
def test_offsets_vary_over_the_last_dimensions(ndim, shape):
    made = allocated("lsq", randn(2, 3, 4, 5), axis=1, offsets="both", offset_ndim=ndim)
    assert made.offset_before.shape == made.offset_after.shape == shape


@pytest.mark.parametrize("offsets", ["before", "both"])
def test_shift_quantize_shift(offsets):
    x = randn(2, 3, 4)
    made = shifted(x, offsets, axis=-2)
    moved = x + made.offset_before
    expected = F.lsq(moved, made.quantizer.scale, -8, 7, -2) + (made.offset_after if offsets == "both" else 0)
    assert_close(made(x), expected)
    assert torch.equal(made.codes(x), F.lsq_codes(moved, made.quantizer.scale, -8, 7, -2))


def test_codes_of_a_net_in_half_precision_are_those_of_its_forward():
    x = randn(2, 50, 40).bfloat16()
    made = shifted(randn(2, 50, 40), "both", axis=-2).bfloat16()
    moved, scale = x.float() + made.offset_before.float(), made.quantizer.scale.float()
    assert torch.equal(made.codes(x), F.lsq_codes(moved, scale, -8, 7, -2))
    given = made(x).float() - made.offset_after.float()
    assert_close((given / scale[:, None]).round(), made.codes(x).float(), rtol=0, atol=0.5)


def test_calibration_sees_the_shifted_input():
    x = randn(2, 3, 4)
    made = shifted(x, axis=-2)
    assert_close(made.quantizer.scale, F.lsq_init_scale(x + made.offset_before, -8, 7, -2))


def test_gradients_of_the_offsets():
    x = randn(2, 3, 4)
    made = shifted(x, axis=-2, bits=2)
    upstream = randn(2, 3, 4, seed=1)
    made(x).backward(upstream)
    u = (x + made.offset_before).detach() / made.quantizer.scale.detach().view(3, 1)
    inside = (u >= -2) & (u <= 1)
    assert not inside.all()
    assert_close(made.offset_before.grad, (upstream * inside).sum((0, 1)))
    assert_close(made.offset_after.grad, upstream.sum((0, 1)))


def test_goes_around_any_quantizer():
    x = randn(2, 3, 4)
    made = calibrated("minmax", x, axis=-2, offsets="both")
    assert_close(made(x), calibrated("minmax", x, axis=-2)(x))
    assert made.n_scales == 3


def test_axis_is_that_of_the_quantizer_in_the_middle():
    assert allocated("lsq", randn(8, 4), axis=-2, offsets="both").axis is None
