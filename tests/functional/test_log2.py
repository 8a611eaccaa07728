"""Powers of two. Oracle: closed forms; a softmax in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qat import functional as F


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_deviates_from_reference_zero_of_log2(bits):
    # There inf - inf in its straight-through rounding makes a NaN.
    x = torch.zeros(3, requires_grad=True)
    out = F.fake_quantize_log2(x, bits)
    assert out.tolist() == [0, 0, 0]
    assert F.log2_codes(x, bits).tolist() == [2**bits - 1] * 3
    out.sum().backward()
    assert x.grad.tolist() == [0, 0, 0]


def test_gradient_passes_through_the_rounding_of_the_logarithm():
    x = torch.tensor([1.9, 0.9, 0.3, 0.13, 1e-3], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    F.fake_quantize_log2(x, 2).backward(upstream)
    assert_close(x.grad, upstream * torch.tensor([0.0, 1 / 0.9, 0.25 / 0.3, 0.125 / 0.13, 0.0]))


@given(st.integers(0, 2**31), st.floats(0.002, 0.02), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_log_int_softmax_is_a_softmax_to_less_than_an_octave(seed, scale, length):
    generator = torch.Generator().manual_seed(seed)
    steps = (torch.rand(3, length, generator=generator) * 10 / scale).round()
    out = F.log_int_softmax(steps * scale, torch.tensor([scale]), 8)
    exact = (steps.double() * scale).softmax(-1)
    likely = exact > 2.0**-5
    # A ratio above 2.5 is rounded to 3 and goes to 4. The integer exponential counts ln 2 in whole steps, an error of up to scale / ln 2
    # in each of 5 octaves; rounding the constants of its polynomial adds less than 2 scale.
    assert ((out / exact).log2()[likely].abs() < math.log2(4 / 2.5) + 10 * scale).all()


@pytest.mark.parametrize(("scale", "finer"), [(1.7, 2.0**-7), (4.0, 2.0**-8), (100.0, 2.0**-13)])
def test_deviates_from_reference_log_int_softmax_of_coarse_scores(scale, finer):
    x = torch.tensor([[0.0, 1.0, 1.0, -3.0], [5.0, 5.0, 5.0, 5.0]]) * scale
    out = F.log_int_softmax(x, torch.tensor([scale]))
    assert torch.equal(out, F.log_int_softmax(x, torch.tensor([scale * finer])))
    assert out[1].tolist() == [0.25] * 4
