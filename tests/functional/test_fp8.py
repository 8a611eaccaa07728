"""Floats of 8 bits with one scale. Oracles: torch's E4M3 type, to the byte; gradients of the formula by autograd."""

import pytest
import torch

from qat.functional import fp8, fp8_codes, fp8_scale
from tests.tiny import randn

LARGEST, ONE = 448.0, torch.ones(1)


def cast(u):
    """Bits of the nearest E4M3 value; torch's cast makes NaN of what is too large."""
    return u.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def values():
    """The 127 values from 0 to 448."""
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def ties():
    """The middle between each two neighbours, and the floats around it."""
    middle = (values()[1:] + values()[:-1]) / 2
    return torch.cat([middle, middle.nextafter(torch.zeros(1)), middle.nextafter(2 * middle)])


INPUTS = {
    "normal": lambda: randn(100_000) * 40,
    "small": lambda: randn(100_000) / 100,
    "ties": ties,
    "saturated": lambda: torch.tensor([448.0, 463.9, 464.0, 465.0, 1e9, 3e38, float("inf")]),
    "zeros": lambda: torch.tensor([0.0, 2.0**-10, 2.0**-11, 1e-30, 1e-45]),
    "nan": lambda: torch.tensor([float("nan"), 1.0]),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("scale", [1.0, 0.0123, 3e-7])
@pytest.mark.parametrize("sign", [1, -1])
def test_codes_and_values_are_those_of_torch(name, scale, sign):
    x = sign * INPUTS[name]() * (scale if scale > 0.01 else 1)
    scale = torch.tensor([scale])
    expected = cast(x / scale)
    assert torch.equal(fp8_codes(x, scale, None), expected)
    number = expected.view(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(fp8(x, scale, None), number, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    x, scale = randn(1000).to(dtype), torch.tensor([0.01])
    y = fp8(x, scale, None)
    assert y.dtype == dtype
    assert torch.equal(y, fp8(x.float(), scale, None).to(dtype))


def test_a_scale_for_each_row():
    w = randn(3, 5, 2, 2) * torch.tensor([1e-6, 1.0, 30.0]).view(3, 1, 1, 1)
    flat = w.flatten(1)
    scale = fp8_scale(flat.amin(1), flat.amax(1))
    assert torch.equal(scale, flat.abs().amax(1) / LARGEST)
    for row, step in enumerate(scale):
        assert torch.equal(fp8(w, scale, 0)[row], fp8(w[row], step.reshape(1), None))
        assert torch.equal(fp8_codes(w, scale, 0)[row], cast(w[row] / step))
    largest = (fp8_codes(w, scale, 0) & 127).flatten(1).amax(1)
    assert largest.tolist() == [126] * 3  # the code of 448


def test_a_row_of_zeros_stays_zero():
    zeros = torch.zeros(2)
    scale = fp8_scale(zeros, zeros)
    assert (scale > 0).all()
    assert not fp8(torch.zeros(2, 4), scale, 0).any()


def test_gradients():
    """Straight through E4M3 inside 448 s; LSQ's 1 / sqrt(448 m) on the scale."""
    x, grad = randn(64) * 300, randn(64, seed=1)
    x[:2] = torch.tensor([448.0, -448.0])
    scale = torch.ones(1)
    inputs = [t.clone().requires_grad_() for t in (x, scale)]
    fp8(*inputs, None).backward(grad)
    formula = [t.clone().requires_grad_() for t in (x, scale)]
    u = formula[0] / formula[1]
    nearest = cast(x).view(torch.float8_e4m3fn).float()
    rounded = torch.where(x.abs() <= LARGEST, nearest + (u - u.detach()), nearest)
    (rounded * formula[1]).backward(grad)
    torch.testing.assert_close(inputs[0].grad, formula[0].grad)
    torch.testing.assert_close(inputs[1].grad, formula[1].grad / (LARGEST * 64) ** 0.5)
