"""What holds for every input of every quantizer. Oracle: the property itself; inputs are finite floats of any size, denormals too."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import functional as F

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


def steps(x, axis, seed):
    """A step for each slice, from 1e-4 to 1e4."""
    n = 1 if axis is None else x.shape[axis]
    return 10 ** (8 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 4)


def zeros(scale, bits, seed):
    """A zero point for each step."""
    return torch.randint(
        0, 2**bits, scale.shape, generator=torch.Generator().manual_seed(seed)
    ).float()


def axes(x):
    return [None, *range(x.ndim)]


class OfLsq:
    """LSQ on given steps; `codes` and `decode` take the codes apart from the values."""

    def __init__(self, x, axis, bits, seed, *, signed=True):
        self.bounds = F.code_range(bits, signed=signed)
        self.axis, self.scale = axis, steps(x, axis, seed)

    def __call__(self, x, scale=None):
        return F.lsq(x, self.scale if scale is None else scale, *self.bounds, self.axis)

    def codes(self, x):
        return F.lsq_codes(x, self.scale, *self.bounds, self.axis)

    def decode(self, codes, ndim):
        return codes.float() * F.view_along(self.scale, ndim, self.axis)


class OfAffine(OfLsq):
    """The affine grid on given steps and zero points."""

    def __init__(self, x, axis, bits, seed):
        super().__init__(x, axis, bits, seed, signed=False)
        self.zero = zeros(self.scale, bits, seed + 1)

    def __call__(self, x, scale=None):
        step = self.scale if scale is None else scale
        return F.fake_quantize_affine(x, step, self.zero, *self.bounds, self.axis)

    def codes(self, x):
        return F.affine_codes(x, self.scale, self.zero, *self.bounds, self.axis)

    def decode(self, codes, ndim):
        return (codes.float() - F.view_along(self.zero, ndim, self.axis)) * F.view_along(
            self.scale, ndim, self.axis
        )


class OfStatsQ(OfLsq):
    """StatsQ on given scales."""

    def __init__(self, x, axis, bits, seed):
        super().__init__(x, axis, bits, seed)
        self.bits = bits

    def __call__(self, x, scale=None):
        step = self.scale if scale is None else scale
        return F.statsq_with_scale(x, F.view_along(step, x.ndim, self.axis), self.bits)

    def codes(self, x):
        return F.statsq_codes_with_scale(x, F.view_along(self.scale, x.ndim, self.axis), self.bits)

    def decode(self, codes, ndim):
        return (
            (codes.float() + 0.5) / 2 ** (self.bits - 1) * F.view_along(self.scale, ndim, self.axis)
        )


GRIDS = {"lsq": OfLsq, "affine": OfAffine, "statsq": OfStatsQ}
grids = pytest.mark.parametrize("grid", GRIDS)


def drawn(data, grid, inputs=tensors):
    """An input, and a quantizer of its shape."""
    x = data.draw(inputs)
    return x, GRIDS[grid](
        x, data.draw(st.sampled_from(axes(x))), data.draw(BITS), data.draw(st.integers(0, 2**20))
    )


@grids
@given(data=st.data())
@EXAMPLES
def test_codes_are_in_the_range_and_say_the_value_to_the_last_bit(grid, data):
    x, quantizer = drawn(data, grid)
    codes, out = quantizer.codes(x), quantizer(x)
    assert quantizer.bounds[0] <= codes.min()
    assert codes.max() <= quantizer.bounds[1]
    assert codes.shape == out.shape == x.shape
    assert out.isfinite().all()
    assert torch.equal(out, quantizer.decode(codes, x.ndim))


@grids
@given(data=st.data())
@EXAMPLES
def test_quantizing_twice_changes_nothing(grid, data):
    """On a given scale; StatsQ of a weight computes its scale, another one from rounded weights."""
    x, quantizer = drawn(data, grid)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)


@grids
@given(data=st.data())
@EXAMPLES
def test_a_larger_value_never_gets_a_smaller_code(grid, data):
    x = data.draw(tensors).flatten().sort().values.unsqueeze(0)
    quantizer = GRIDS[grid](
        x, data.draw(st.sampled_from([None, 0])), data.draw(BITS), data.draw(st.integers(0, 2**20))
    )
    assert (quantizer.codes(x).int().diff() >= 0).all()
    assert (quantizer(x).diff() >= 0).all()


@grids
@given(data=st.data(), exponent=EXPONENTS)
@EXAMPLES
def test_a_power_of_two_passes_through(grid, data, exponent):
    """Exact as long as nothing is denormal and no step is below LSQ's floor, for which steps are at least 1e-4 * 2^12 here."""
    x, quantizer = drawn(data, grid, plain_tensors)
    factor = 2.0**exponent
    quantizer.scale = quantizer.scale * 2.0**12
    assert torch.equal(quantizer(x * factor, scale=quantizer.scale * factor), quantizer(x) * factor)


@grids
@given(data=st.data(), seed=st.integers(0, 2**20))
@EXAMPLES
def test_channels_do_not_know_their_order(grid, data, seed):
    x, quantizer = drawn(data, grid)
    out, axis = quantizer(x), quantizer.axis
    if axis is None:
        order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(quantizer(x.flatten()[order]), out.flatten()[order])
        return
    order = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(seed))
    quantizer.scale = quantizer.scale[order]
    if hasattr(quantizer, "zero"):
        quantizer.zero = quantizer.zero[order]
    assert torch.equal(quantizer(x.index_select(axis, order)), out.index_select(axis, order))


@grids
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4, 0), (2, 0, 3), (2, 3, 4)])
def test_shape_and_dtype_stay(grid, dtype, shape):
    x = values(shape, 1).to(dtype)
    quantizer = GRIDS[grid](x, 0, 4, 0)
    assert (quantizer(x).shape, quantizer(x).dtype) == (x.shape, dtype)
    assert quantizer.codes(x).shape == x.shape
    assert F.fake_quantize_log2(x.abs(), 4).dtype == dtype
    assert F.log2_codes(x.abs(), 4).shape == x.shape


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
    axis = data.draw(st.sampled_from(axes(x)))
    scale, zero = F.affine_scale(x, bits, signed, axis)
    low, high = F.code_range(bits, signed=signed)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert ((zero >= low) & (zero <= high) & (zero == zero.round())).all()
    assert F.fake_quantize_affine(x, scale, zero, low, high, axis).isfinite().all()
    ordinary = (scale > 1e-2) & (scale < 1e30)
    again, _ = F.affine_scale(x * 2.0**exponent, bits, signed, axis)
    assert torch.equal(again[ordinary], (scale * 2.0**exponent)[ordinary])
