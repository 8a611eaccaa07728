"""Properties of all quantizers for all inputs: finite floats of any size, including denormals."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import functional as F
from tests.quantizers.common import allocated

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
BITS = st.integers(2, 8)
# Values where float32 ends, is denormal or has no sign, beside ordinary ones.
EDGES = (0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 1e-20, -1e-5, 0.5, -1.0, 1.0, 2.5, -1e5, 1e20, 1e37)
SHAPES = st.sampled_from([(4, 6), (3, 4, 5), (2, 3, 4, 2), (1, 1), (5, 1)])
EXPONENTS = st.integers(-12, 12)


def values(shape, seed, low=None):
    """A tensor of edges, of ordinary numbers, of one number everywhere, or of zeros."""
    generator = torch.Generator().manual_seed(seed)
    kind = seed % 4
    if kind == 0:
        x = torch.tensor(EDGES)[torch.randint(len(EDGES), shape, generator=generator)]
    elif kind == 1:
        exponent = torch.randint(-6, 7, (), generator=generator).item()
        x = torch.randn(shape, generator=generator) * 10.0**exponent
    elif kind == 2:
        x = torch.full(shape, EDGES[seed // 4 % len(EDGES)])
    else:
        x = torch.randn(shape, generator=generator).round(decimals=1)
    return x if low is None else x.abs().clamp(min=low)


tensors = st.builds(values, SHAPES, st.integers(0, 2**31))
plain_tensors = st.builds(
    lambda shape, seed: values(shape, 4 * seed + 1), SHAPES, st.integers(0, 2**20)
)
probabilities = st.builds(functools.partial(values, low=0.0), SHAPES, st.integers(0, 2**31))


def axes(x):
    return [None, *range(1, x.ndim)]


quantizers = pytest.mark.parametrize("name", ["lsq", "seq", "minmax"])


def drawn(data, name, x, choices):
    """A quantizer for `x` with steps from 1e-4 to 1e4, and a zero point for each if it has them."""
    bits = data.draw(BITS)
    quantizer = allocated(name, x, bits=bits, axis=data.draw(st.sampled_from(choices)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    quantizer.set_scale(
        10 ** (8 * torch.rand(quantizer.num_stored_scales, generator=generator) - 4)
    )
    if name == "minmax":
        codes = torch.randint(0, 2**bits, quantizer.zero_point.shape, generator=generator)
        quantizer.zero_point.copy_(codes)
    return quantizer


@quantizers
@given(data=st.data())
@EXAMPLES
def test_codes_are_in_the_range_and_say_the_value_to_the_last_bit(name, data):
    x = data.draw(tensors)
    quantizer = drawn(data, name, x, axes(x))
    codes, out, grid = quantizer.codes(x), quantizer(x), quantizer.grid()
    assert grid.qmin <= codes.min()
    assert codes.max() <= grid.qmax
    assert codes.shape == out.shape == x.shape
    assert out.isfinite().all()
    assert torch.equal(out, grid.dequantize(codes.float()))
    assert torch.equal(quantizer(out), out)


@quantizers
@given(data=st.data())
@EXAMPLES
def test_a_larger_value_never_gets_a_smaller_code(name, data):
    x = data.draw(tensors).flatten().sort().values.unsqueeze(0)
    quantizer = drawn(data, name, x, [None])
    assert (quantizer.codes(x).int().diff() >= 0).all()
    assert (quantizer(x).diff() >= 0).all()


@quantizers
@given(data=st.data(), exponent=EXPONENTS)
@EXAMPLES
def test_a_power_of_two_passes_through(name, data, exponent):
    """Exact as long as nothing is denormal and no step is below LSQ's floor, for which steps are at least 1e-4 * 2^12 here."""
    x, factor = data.draw(plain_tensors), 2.0**exponent
    quantizer = drawn(data, name, x, axes(x))
    scale = quantizer.scale.detach() * 2.0**12
    quantizer.set_scale(scale)
    expected = quantizer(x) * factor
    quantizer.set_scale(scale * factor)
    assert torch.equal(quantizer(x * factor), expected)


@given(tensors, BITS, EXPONENTS, st.integers(0, 2**20))
@EXAMPLES
def test_statsq_on_its_own_scale(x, bits, exponent, seed):
    w = x.reshape(x.shape[0], -1)
    out, codes, n = F.statsq(w, bits), F.statsq_codes(w, bits), 2 ** (bits - 1)
    assert -n <= codes.min()
    assert codes.max() <= n - 1
    assert torch.equal(out, (codes.float() + 0.5) / n * F.statsq_scale(w))
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(F.statsq(w[order], bits), out[order])
    if w.abs().amax() < 1e20 and (w == 0).logical_or(w.abs() > 1e-20).all():
        assert torch.equal(F.statsq(w * 2.0**exponent, bits), out * 2.0**exponent)


@given(probabilities, BITS)
@EXAMPLES
def test_log2_codes_are_in_the_range_and_are_exponents(x, bits):
    codes, out = F.log2_codes(x, bits).int(), F.fake_quantize_log2(x, bits)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    is_kept = out > 0
    assert torch.equal(out[is_kept], torch.exp2(-codes.float())[is_kept])
    assert (codes[~is_kept] == 2**bits - 1).all()
    assert torch.equal(F.fake_quantize_log2(out, bits), out)


@pytest.mark.parametrize("signed", [True, False])
@given(data=st.data(), exponent=EXPONENTS)
@EXAMPLES
def test_ranges_read_off_data(signed, data, exponent):
    """Scales are positive and finite for constant, zero and denormal slices; a power of two passes through above the floor."""
    x, bits = data.draw(tensors), data.draw(BITS)
    axis = data.draw(st.sampled_from([0, *axes(x)]))
    scale, zero = F.affine_scale(x, bits, signed, axis)
    low, high = F.code_range(bits, signed=signed)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert ((zero >= low) & (zero <= high) & (zero == zero.round())).all()
    assert F.fake_quantize_affine(x, scale, zero, low, high, axis).isfinite().all()
    ordinary = (scale > 1e-2) & (scale < 1e30)
    again, _ = F.affine_scale(x * 2.0**exponent, bits, signed, axis)
    assert torch.equal(again[ordinary], (scale * 2.0**exponent)[ordinary])
