"""LSQ modules. Oracle: the pure functions, and averages written out."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from tests.quantizers.common import allocated, calibrated
from tests.tiny import randn


@pytest.mark.parametrize(("signed", "bounds"), [(True, (-8, 7)), (False, (0, 15))])
@pytest.mark.parametrize("initial", ["lsq", "mse"])
def test_several_batches_average(initial, signed, bounds):
    batches = [randn(2, 3, 4, seed=s) for s in range(3)]
    made, state = allocated("lsq", batches[0], axis=-2, signed=signed, step_init=initial), {}
    for batch in batches:
        made.calibrate(batch, state)
    first_step = F.mse_init_scale if initial == "mse" else F.lsq_init_scale
    assert_close(made.scale.detach(), sum(first_step(b, *bounds, -2) for b in batches) / 3)


def image(lowest, seed=0):
    x = randn(2, 3, 4, 4, seed=seed).abs()
    x[0, 0, 0, 0] = lowest
    return x


@pytest.mark.parametrize(
    ("lowest", "signed"), [(-0.5, True), (-2e-5, True), (-1e-6, False), (0.0, False)]
)
def test_sign_of_an_image_comes_from_the_data(lowest, signed):
    x = image(lowest)
    made = calibrated("lsq", x, role="image", bits=8, signed=None, axis=1)
    assert made.signed.item() == signed
    high = 127 if signed else 255
    assert_close(made.scale.detach(), 2 * x.abs().mean((0, 2, 3)) / high**0.5)
    codes = made.codes(100 * x)
    assert codes.max() == high
    assert (codes.min() >= 0) is not signed
    assert lowest != -0.5 or codes.min() == -128
    assert torch.equal(made(x), made.codes(x).float() * made.scale.view(3, 1, 1))


def test_a_later_batch_can_still_show_the_sign():
    batches = [image(0.0, seed=0), image(-1.0, seed=1), image(0.0, seed=2)]
    made, state = allocated("lsq", batches[0], role="image", bits=8, signed=None, axis=1), {}
    for batch in batches:
        made.calibrate(batch, state)
    assert made.signed.item() == 1
    mean_abs = sum(b.abs().mean((0, 2, 3)) for b in batches) / 3
    assert_close(made.scale.detach(), 2 * mean_abs / 127**0.5)


def test_deviates_from_reference_sign_of_images_is_found_at_initialization():
    # There any forward pass with a negative pixel makes the codes signed for good.
    made = calibrated("lsq", image(0.0), role="image", bits=8, signed=None, axis=1)
    made(image(-3.0))
    assert made.signed.item() == 0
    other = allocated("lsq", image(0.0), role="image", bits=8, signed=None, axis=1)
    other.load_state_dict(made.state_dict(), strict=True)
    x = image(-3.0)
    assert torch.equal(other(x), made(x))
    assert other.codes(x).min() == 0
