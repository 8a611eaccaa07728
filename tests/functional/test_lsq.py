"""LSQ. Oracle: the same formula written with a straight-through rounding and differentiated by autograd."""

import math

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat.functional.lsq import MSE_FACTORS, SCALE_FLOOR, CodeRange, lsq_forward
from qat.functional.observers import affine_error
from qat.functional.ste import sum_along
from qat.quantizers.lsq import _fake_quantize
from tests.tiny import kept_bytes, randn

SHAPES = (6, 5), (2, 4, 3), (2, 3, 4, 5)
CASES = [(shape, axis) for shape in SHAPES for axis in (*range(-len(shape), len(shape)), None)]
RANGES = [(-2, 1), (-4, 3), (-8, 7), (-128, 127), (0, 3), (0, 255)]

# Many candidates have the same error on whole numbers, on equal ones and on zeros.
VALUES = {
    "normal": lambda x: x,
    "tiny": lambda x: 1e-6 * x,
    "whole": lambda x: (3 * x).round(),
    "equal": lambda x: torch.full_like(x, 0.5),
    "zero rows": lambda x: x * (torch.arange(33) % 2).view(33, 1),
}


def naive(x, scale, qmin, qmax, axis):
    """LSQ without its gradient scale; the step's floor is straight-through."""
    step = scale + (scale.clamp(min=1e-5) - scale).detach()
    if axis is not None:
        step = step.view([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])
    u = (x / step).clamp(qmin, qmax)
    return (u.round().detach() + (u - u.detach())) * step


def n_per_scale(x, axis):
    return x.numel() if axis is None else x.numel() // x.shape[axis]


def case(shape, axis, seed=0):
    x = 2 * randn(*shape, seed=seed)
    scale = 0.1 + randn(1 if axis is None else shape[axis], seed=seed + 1).abs()
    return x, scale


def gradients(function, x, scale, upstream):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    out = function(x, scale)
    out.backward(upstream)
    return out.detach(), x.grad, scale.grad


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_agrees_with_autograd(shape, axis, qmin, qmax):
    x, scale = case(shape, axis)
    upstream = randn(*shape, seed=2)
    out, grad_x, grad_scale = gradients(
        lambda x, s: F.lsq(x, s, qmin, qmax, axis), x, scale, upstream
    )
    expected, expected_x, expected_scale = gradients(
        lambda x, s: naive(x, s, qmin, qmax, axis), x, scale, upstream
    )
    assert torch.equal(out, expected)
    assert_close(grad_x, expected_x, rtol=1e-6, atol=1e-6)
    assert_close(
        grad_scale, expected_scale / math.sqrt(qmax * n_per_scale(x, axis)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_deviates_from_reference_closed_range_has_a_gradient(qmin, qmax):
    bounds = torch.tensor([float(qmin), float(qmax)])
    outside = torch.nextafter(bounds, torch.tensor([-math.inf, math.inf]))
    x = torch.cat([
        bounds,
        outside if qmin else torch.stack([torch.tensor(-1e-6), outside[1]]),
    ]).requires_grad_()
    F.lsq(x, torch.ones(1), qmin, qmax, None).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("scale", [1e-7, 0.0, -0.3])
def test_floor_of_the_step_is_straight_through(scale):
    x = torch.tensor([3.2e-5, -4e-5])
    learned = torch.tensor([scale], requires_grad=True)
    out = F.lsq(x, learned, -8, 7, None)
    out.sum().backward()
    assert_close(out, torch.tensor([3e-5, -4e-5]), rtol=1e-6, atol=0)
    assert_close(learned.grad, torch.tensor([-0.2 / math.sqrt(7 * 2)]), rtol=1e-4, atol=0)


def test_backward_keeps_input_and_scale_only():
    x, scale = (t.requires_grad_() for t in case((4, 16, 32), 1))
    kept, _ = kept_bytes(lambda: F.lsq(x, scale, -2, 1, 1), [])
    assert kept == x.nbytes + scale.nbytes


def test_the_first_step_of_zeros_is_zero():
    assert torch.equal(F.mse_init_scale(torch.zeros(2, 3), -2, 1, 0), torch.zeros(2))


def test_the_first_step_of_few_small_values_is_in_their_unit():
    x = torch.zeros(1, 384)
    x[0, :10] = 0.1
    assert_close(F.mse_init_scale(x * 1e-3, -8, 7, 0), F.mse_init_scale(x, -8, 7, 0) * 1e-3)


@pytest.mark.sample(24)
@pytest.mark.parametrize("quantize", [None, _fake_quantize])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("axis", [None, 0, -2, -1])
@pytest.mark.parametrize("bounds", [(-8, 7), (0, 15), (-128, 127)])
def test_the_search_finds_the_bits_of_the_loop(bounds, axis, values, transposed, quantize):
    x = VALUES[values](randn(4, 33, 120))
    x = x.transpose(0, -1) if transposed else x
    x = x if bounds[0] else x.abs()
    half = CodeRange(*bounds, axis, half=True)

    def half_step_error(step):
        return sum_along((lsq_forward(x, step, None, None, half) - x).square(), axis)

    def error(step):
        return affine_error(x, step, torch.zeros_like(step), bounds, axis, axis)

    factors = torch.tensor(MSE_FACTORS)
    for function, start, error_of in (
        (F.mse_init_scale, F.lsq_init_scale(x, *bounds, axis), error),
        (F.half_step_init_scale, 2 * F.mean_abs(x, axis) / (bounds[1] + 1), half_step_error),
    ):
        first = torch.where(start > 0, start, SCALE_FLOOR)
        errors = [error_of(step) for step in first * factors[:, None]]
        found = function(x, *bounds, axis, quantize)
        assert torch.equal(found, start * factors[torch.stack(errors).argmin(0)])


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("bounds", [(-2, 1), (-8, 7)], ids=["2 bits", "4 bits"])
@pytest.mark.parametrize("function", [F.mse_init_scale, F.half_step_init_scale])
def test_the_search_rounds_few_candidates(function, bounds, axis):
    steps = []

    def rounded(x, step, codes):
        steps.append(step)
        return lsq_forward(x, step, None, None, codes)

    function(randn(500, 24), *bounds, axis, rounded)
    assert len(steps) < 8
