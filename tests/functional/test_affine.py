"""Affine quantization. Oracle: torch, and gradients written out."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from tests.tiny import randn


@pytest.mark.parametrize(
    ("bits", "signed", "zero_point"), [(2, True, 0), (2, False, 2), (4, True, 0), (8, False, 100)]
)
def test_agrees_with_torch(bits, signed, zero_point):
    x, upstream = randn(400, seed=1), randn(400, seed=2)
    scale, bounds = 0.5 ** (bits - 1), F.code_range(bits, signed=signed)
    theirs = x.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, *bounds)
    expected.backward(upstream)
    ours = x.clone().requires_grad_()
    out = F.fake_quantize_affine(
        ours, torch.tensor([scale]), torch.tensor([float(zero_point)]), *bounds, None
    )
    out.backward(upstream)
    assert 0 < (theirs.grad == 0).sum() < 400
    assert torch.equal(out, expected)
    assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("axis", [0, -1, None])
def test_a_scale_may_learn(axis):
    x = randn(3, 5)
    scale, zero_point = F.affine_scale(x, 2, False, axis)
    scale = (0.7 * scale).requires_grad_()
    F.fake_quantize_affine(x, scale, zero_point, 0, 3, axis).sum().backward()
    step = F.view_along(scale.detach(), 2, axis).expand(3, 5)
    zero = F.view_along(zero_point, 2, axis)
    code = (x / step + zero).round()
    is_inside = (code >= 0) & (code <= 3)
    per_value = torch.where(is_inside, code - zero - x / step, code.clamp(0, 3) - zero)
    expected = per_value.sum().view(1) if axis is None else per_value.sum(1 if axis == 0 else 0)
    assert_close(scale.grad, expected)
