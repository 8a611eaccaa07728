"""Half steps of a learned size. Oracle: the formula of ParetoQ written out in float64, and autograd with a straight-through rounding."""

import pytest
import torch
from torch.testing import assert_close

import qat
from qat import functional as F
from qat.quantizers import LSQ, SEQ, AutoSignLSQ, build_quantizer
from qat.spec import QuantSpec
from tests.quantizers.common import allocated, calibrated
from tests.tiny import randn


def written_out(x, scale, n, axis):
    """k = clamp(floor(x / s), -n, n - 1), value (k + 1/2) s; straight through within [-n, n]."""
    x, s = x.double(), F.view_along(scale.double(), x.ndim, axis)
    u = (x / s).clamp(-n, n)
    level = u.detach().floor().clamp(-n, n - 1) + 0.5
    return (u + (level - u).detach()) * s, level - 0.5


@pytest.mark.parametrize("axis", [0, -1, 1, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_codes_and_gradients_are_the_formulas(bits, axis):
    x = randn(4, 3, 5).requires_grad_()
    made = calibrated("seq", x.detach(), bits=bits, axis=axis)
    upstream, n = randn(4, 3, 5, seed=1), 2 ** (bits - 1)
    y = made(x)
    y.backward(upstream)
    x2, scale = x.detach().double().requires_grad_(), made.scale.detach().double().requires_grad_()
    expected, codes = written_out(x2, scale, n, axis)
    expected.backward(upstream.double())
    assert_close(y, expected.float())
    assert torch.equal(made.codes(x).double(), codes)
    assert_close(x.grad, x2.grad.float())
    factor = (n * x.numel() / scale.numel()) ** -0.5
    assert_close(made.scale.grad, (scale.grad * factor).float(), rtol=1e-5, atol=1e-6)


def test_deviates_from_reference_ties_go_to_the_even_code_as_onnx_rounds():
    made = allocated("seq", torch.zeros(1, 9), bits=3, axis=None)
    made.set_scale(torch.ones(1))
    x = torch.arange(-4.0, 5.0)[None]
    expected = (x - 0.5).round().clamp(-4, 3)
    assert torch.equal(made.codes(x).float(), expected)
    assert torch.equal(made.grid().to_code_coordinates(x).round().clamp(-4, 3), expected)


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_deviates_from_reference_the_start_by_least_squares_is_the_best_of_its_candidates(
    bits, axis
):
    x, n = randn(4, 64), 2 ** (bits - 1)
    start = F.half_step_init_scale(x, -n, n - 1, axis)
    rows = x if axis == 0 else x.view(1, -1)
    candidates = 2 * rows.abs().mean(1) / n * 2 ** (torch.arange(-24, 33).view(-1, 1) / 8)
    errors = []
    for scale in candidates:
        values, _ = written_out(rows, scale, n, 0)
        errors.append((values - rows).square().mean(1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    assert_close(start, candidates.gather(0, best)[0])


def test_of_a_gaussian_the_error_is_that_of_the_literature():
    x = randn(1, 200_000)
    for bits, expected in ((2, 0.1188), (3, 0.0374), (4, 0.0115)):  # Max 1960, evenly spaced levels
        made = calibrated("seq", x, bits=bits, axis=None, step_init="mse")
        assert (made(x) - x).square().mean() < 1.02 * expected


@pytest.mark.parametrize(("signed", "kind"), [(True, SEQ), (False, LSQ), (None, AutoSignLSQ)])
def test_deviates_from_reference_what_has_no_negative_values_keeps_lsqs_grid(signed, kind):
    role = "image" if signed is None else "input"
    assert type(build_quantizer(QuantSpec(role, "seq", 2, signed=signed))) is kind


def test_the_recipe():
    made = qat.recipe("seq", bits=2)
    assert (made.attention, made.steps, made.step_init) == ("standard", "relative", "mse")
    assert made.weight_spec("block").quantizer == made.act_spec("input", "block").quantizer == "seq"
    assert made.weight_spec("head").quantizer == "lsq"
    assert made.at("blocks.3.attn.proj").act_spec("input", "block").quantizer == "lsq"
