"""Steps that are learned relative to where they began. Oracle: s0 * exp(t), and the chain rule."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat import kernels
from qat.functional.lsq import relative_step
from qat.model.transfer import copy_scales
from tests.quantizers.common import calibrated
from tests.tiny import converted, images, quantized, randn


@pytest.mark.parametrize("quantizer", ["lsq", "seq"])
def test_the_gradient_is_that_of_the_step_times_the_step(quantizer):
    x = randn(3, 8)
    absolute, relative = (
        calibrated(quantizer, x, axis=0, steps=steps) for steps in ("absolute", "relative")
    )
    for made in (absolute, relative):
        made(x).square().sum().backward()
    assert torch.equal(absolute(x), relative(x))
    assert torch.equal(absolute.scale, relative.scale)
    assert_close(relative.change.grad, absolute.scale.grad * absolute.scale.detach())
    assert sorted(relative.state_dict()) == ["change", "start"]
    assert sorted(absolute.state_dict()) == ["scale"]
    assert relative.num_stored_scales == absolute.num_stored_scales == 3


def test_deviates_from_reference_no_update_kills_a_step():
    made = calibrated("lsq", randn(3, 8), axis=0, steps="relative")
    optimizer = torch.optim.SGD([made.change], lr=1.0)
    made.change.grad = torch.tensor([5.0, 0.0, -5.0])
    before = made.scale.detach().clone()
    optimizer.step()
    assert_close(made.scale.detach(), before * torch.tensor([-5.0, 0.0, 5.0]).exp())
    assert (made.scale > 0).all()


def test_an_activation_that_begins_at_zero_grows_and_can_be_used():
    """Attention behind random weights gives nothing at 2 bits: relative to that a step would never get anywhere."""
    made = calibrated("lsq", torch.zeros(1, 3, 8), bits=2, axis=-2, steps="relative")
    unit = F.min_reliable_step(1)
    assert_close(made.scale.detach(), torch.full((3,), unit / 64))
    assert unit == pytest.approx(2 * (2 / torch.pi) ** 0.5 / 64)
    with torch.no_grad():
        made.change.copy_(torch.tensor([2.0, 0.0, -2.0]))
    first = unit / 64
    assert_close(
        made.scale.detach(),
        torch.tensor([first * 7.389056 + (unit - first) * 2, first, first * 0.135335]),
    )
    made.scale.sum().backward()
    assert (made.change.grad > 0).all()


@pytest.mark.parametrize("unit", [0.0, 0.05])
def test_in_one_node_it_is_the_formula(unit):
    start, change = torch.rand(50) / 10, randn(50).requires_grad_()
    change.data[:10] = 0
    made, expected = (step(start, change, unit) for step in (relative_step, kernels.relative_step))
    assert torch.equal(made, expected)
    assert_close(*(torch.autograd.grad(one.square().sum(), change)[0] for one in (made, expected)))


def test_scales_that_are_set_are_in_force_to_the_bit():
    made = calibrated("lsq", randn(3, 8), axis=0, steps="relative")
    with torch.no_grad():
        made.change.add_(0.3)
    wanted = torch.tensor([0.1, 0.2, 0.3])
    made.set_scale(wanted)
    assert torch.equal(made.scale.detach(), wanted)


@pytest.mark.parametrize(("source", "target"), [("absolute", "relative"), ("relative", "absolute")])
def test_scales_are_carried_over_between_the_two(source, target):
    donor, net = quantized(steps=source), converted(steps=target)
    with torch.no_grad():
        for parameter in donor.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1.01)
    net.load_state_dict(donor.state_dict(), strict=False)
    copied, missing = copy_scales(donor, net)
    assert (missing, bool(copied)) == ([], True)
    assert_close(net(images()), donor(images()), rtol=1e-5, atol=1e-5)
