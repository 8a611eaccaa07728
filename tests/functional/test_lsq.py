"""LSQ. Oracle: the same formula written with a straight-through rounding and differentiated by autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qat import functional as F

SHAPES_AND_AXES = [
    ((6, 5), [0, 1, -1, -2, None]),
    ((2, 4, 3), [0, 1, 2, -1, -2, -3, None]),
    ((2, 3, 4, 5), [0, 1, 2, 3, -1, -2, -3, -4, None]),
]
CASES = [(shape, axis) for shape, axes in SHAPES_AND_AXES for axis in axes]
RANGES = [(-2, 1), (-4, 3), (-8, 7), (-128, 127), (0, 3), (0, 255)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    out, grad_x, grad_scale = gradients(lambda x, s: F.lsq(x, s, qmin, qmax, axis), x, scale, upstream)
    expected, expected_x, expected_scale = gradients(lambda x, s: naive(x, s, qmin, qmax, axis), x, scale, upstream)
    assert torch.equal(out, expected)
    assert_close(grad_x, expected_x, rtol=1e-6, atol=1e-6)
    assert_close(grad_scale, expected_scale / math.sqrt(qmax * n_per_scale(x, axis)), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**31), st.sampled_from(CASES), st.sampled_from(RANGES))
@settings(max_examples=60, deadline=None)
def test_output_is_codes_times_step(seed, shape_and_axis, bounds):
    shape, axis = shape_and_axis
    x, scale = case(shape, axis, seed)
    codes = F.lsq_codes(x, scale, *bounds, axis)
    assert codes.dtype == (torch.int16 if bounds[1] == 255 else torch.int8)
    assert codes.min() >= bounds[0]
    assert codes.max() <= bounds[1]
    assert torch.equal(F.lsq(x, scale, *bounds, axis), codes.float() * F.view_along(scale, x.ndim, axis))


@given(st.integers(0, 2**31), st.sampled_from(CASES), st.sampled_from(RANGES))
@settings(max_examples=60, deadline=None)
def test_error_inside_the_range_is_half_a_step(seed, shape_and_axis, bounds):
    shape, axis = shape_and_axis
    x, scale = case(shape, axis, seed)
    u = x / F.view_along(scale, x.ndim, axis)
    inside = (u >= bounds[0]) & (u <= bounds[1])
    error = (F.lsq_codes(x, scale, *bounds, axis).float() - u).abs()
    assert (error[inside] <= 0.5).all()


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_closed_range_has_a_gradient(qmin, qmax):
    bounds = torch.tensor([float(qmin), float(qmax)])
    outside = torch.nextafter(bounds, torch.tensor([-math.inf, math.inf]))
    x = torch.cat([bounds, outside if qmin else torch.stack([torch.tensor(-1e-6), outside[1]])]).requires_grad_()
    F.lsq(x, torch.ones(1), qmin, qmax, None).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_scale_gradient_by_hand():
    # u = 0.4, 1, 3, -5 in [-2, 1]: round(u) - u inside, the bound outside.
    scale = torch.ones(1, requires_grad=True)
    F.lsq(torch.tensor([0.4, 1.0, 3.0, -5.0]), scale, -2, 1, None).sum().backward()
    assert_close(scale.grad, torch.tensor([(-0.4 + 0 + 1 - 2) / 2]))


def test_ties_round_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert F.lsq_codes(x, torch.ones(1), -8, 7, None).tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("scale", [1e-7, 0.0, -0.3])
def test_floor_of_the_step_is_straight_through(scale):
    x = torch.tensor([3.2e-5, -4e-5])
    learned = torch.tensor([scale], requires_grad=True)
    out = F.lsq(x, learned, -8, 7, None)
    out.sum().backward()
    assert_close(out, torch.tensor([3e-5, -4e-5]), rtol=1e-6, atol=0)
    assert_close(learned.grad, torch.tensor([-0.2 / math.sqrt(7 * 2)]), rtol=1e-4, atol=0)


def test_nan_scale_gives_nan():
    x, scale = case((2, 4, 3), 1)
    scale[2] = torch.nan
    out = F.lsq(x, scale, -2, 1, 1)
    assert out[:, 2].isnan().all()
    assert not out[:, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize("axis", [1, None])
def test_grad_factor_multiplies_only_the_scale_gradient(axis):
    x, scale = case((2, 4, 3), axis)
    upstream = randn(2, 4, 3, seed=2)
    out, grad_x, grad_scale = gradients(lambda x, s: F.lsq(x, s, -2, 1, axis), x, scale, upstream)
    scaled = gradients(lambda x, s: F.lsq(x, s, -2, 1, axis, grad_factor=0.25), x, scale, upstream)
    assert torch.equal(scaled[0], out)
    assert torch.equal(scaled[1], grad_x)
    assert_close(scaled[2], 0.25 * grad_scale, rtol=1e-6, atol=0)


def test_bfloat16_is_computed_in_float32():
    x, scale = case((2, 4, 30), 1)
    x = x.bfloat16()
    out, grad_x, grad_scale = gradients(lambda x, s: F.lsq(x, s, -8, 7, 1), x, scale, torch.ones_like(x))
    assert (out.dtype, grad_x.dtype, grad_scale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = gradients(lambda x, s: F.lsq(x, s, -8, 7, 1), x.float(), scale, torch.ones(x.shape))
    assert torch.equal(out, wide[0].bfloat16())
    assert torch.equal(grad_x, wide[1].bfloat16())
    assert_close(grad_scale, wide[2], rtol=1e-6, atol=0)


def test_autocast_changes_nothing():
    x, scale = case((2, 4, 30), 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.lsq(x, scale, -8, 7, 1)
    assert out.dtype == torch.float32
    assert torch.equal(out, F.lsq(x, scale, -8, 7, 1))


def test_backward_keeps_input_and_scale_only():
    kept = []
    x, scale = (t.requires_grad_() for t in case((4, 16, 32), 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        F.lsq(x, scale, -2, 1, 1)
    assert sorted(kept) == sorted([x.nbytes, scale.nbytes])


def test_a_frozen_scale_costs_no_gradient():
    x, scale = case((2, 4, 3), 1)
    x.requires_grad_()
    F.lsq(x, scale, -2, 1, 1).sum().backward()
    assert scale.grad is None
    assert x.grad is not None


@pytest.mark.parametrize(("shape", "axis"), CASES)
@pytest.mark.parametrize(("qmin", "qmax", "factor"), [(-2, 1, 2), (-8, 7, 2), (0, 3, 4), (0, 255, 4)])
def test_first_step(shape, axis, qmin, qmax, factor):
    x, _ = case(shape, axis)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    assert_close(F.lsq_init_scale(x, qmin, qmax, axis), factor * rows.abs().mean(1) / qmax**0.5)


def squared_error(rows, steps, qmin, qmax):
    """Of fake quantization, for each row (n, m) with its step (n,)."""
    steps = steps[:, None]
    return ((rows / steps).round().clamp(qmin, qmax) * steps - rows).pow(2).mean(1)


@pytest.mark.parametrize(("shape", "axis"), CASES)
@pytest.mark.parametrize(("qmin", "qmax"), [(-2, 1), (-8, 7), (0, 3), (-128, 127)])
def test_first_step_of_least_squared_error(shape, axis, qmin, qmax):
    x, _ = case(shape, axis)
    x = x.repeat(*[20 if i == x.ndim - 1 else 1 for i in range(x.ndim)]) if axis not in {-1, x.ndim - 1} else x
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).exp() * x
    x = x if qmin else x.abs()
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    found = F.mse_init_scale(x, qmin, qmax, axis)
    start = F.lsq_init_scale(x, qmin, qmax, axis)
    candidates = torch.stack([squared_error(rows, start * 2 ** (i / 8), qmin, qmax) for i in range(-24, 33)])
    assert_close(squared_error(rows, found, qmin, qmax), candidates.amin(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("qmin", "qmax", "more"), [(-2, 1, 0.01), (0, 3, 0.01), (-4, 3, 0.02), (-8, 7, 0.02), (0, 15, 0.05), (-128, 127, 0.15)]
)
@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_a_finer_search_for_the_first_step_gains_little(qmin, qmax, more, tail):
    rows = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    rows = rows * (tail * torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))).exp()
    rows = rows if qmin else rows.abs()
    found = squared_error(rows, F.mse_init_scale(rows, qmin, qmax, 0), qmin, qmax)
    start = F.lsq_init_scale(rows, qmin, qmax, 0)
    fine = torch.stack([squared_error(rows, start * 2 ** (i / 100), qmin, qmax) for i in range(-400, 501)]).amin(0)
    assert (found <= (1 + more) * fine).all()


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (2, 7, 5), (3, 11)])
@pytest.mark.parametrize("axis", [0, -1, None])
def test_equal_values_lie_between_two_codes_of_their_first_step(shape, axis):
    x = torch.full(shape, 0.7)
    assert not F.lsq(x, F.lsq_init_scale(x, -2, 1, axis), -2, 1, axis).any()


def test_the_first_step_of_zeros_is_zero():
    assert torch.equal(F.mse_init_scale(torch.zeros(2, 3), -2, 1, 0), torch.zeros(2))
