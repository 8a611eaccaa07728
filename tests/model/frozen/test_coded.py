"""Products of codes. Oracle: the same products of the numbers that the codes stand for, in float64."""

import pytest
import torch
from torch.nn import functional as F

import qat
from qat.model.frozen import Product, QuantizedTensor, noting


def coded(shape, scale_shape, after_shape=None, bound=8, seed=0, name="x"):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-bound, bound + 1, shape, generator=generator)
    scale = torch.rand(scale_shape, generator=generator) + 0.5
    after = None if after_shape is None else torch.randn(after_shape, generator=generator)
    return QuantizedTensor.of(codes, scale, after, bound, name)


def exact(x):
    y = x.codes.double() * x.scale.double()
    return y if x.after is None else y + x.after.double()


def assert_close(found, expected):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("after", [None, (7,), (1, 7)])
@pytest.mark.parametrize("scale", [(5, 1), (1,), (2, 5, 1)])
def test_scales_and_offsets_stay_outside_of_a_linear(scale, after):
    x, w = coded((2, 5, 7), scale, after), coded((4, 7), (4, 1), seed=1, name="w")
    bias = torch.randn(4)
    assert_close(F.linear(x, w, bias), F.linear(exact(x), exact(w), bias.double()))


def test_a_weight_may_have_a_constant_a_row():
    x, w = coded((2, 5, 7), (5, 1), (7,)), coded((4, 7), (4, 1), (4, 1), seed=1)
    assert_close(F.linear(x, w), F.linear(exact(x), exact(w)))


def test_values_are_gathered_with_a_scale_and_an_offset_a_channel():
    probs, values = coded((2, 3, 5, 5), (5, 1), bound=3), coded((2, 5, 12), (12,), (12,), seed=1)
    values = values.unflatten(-1, (3, -1)).transpose(1, 2)
    assert_close(probs @ values, exact(probs) @ exact(values))


@pytest.mark.parametrize(("stride", "padding", "groups"), [(2, 0, 1), (1, 1, 1), (1, 1, 2), (2, (1, 0), 4)])
def test_a_convolution(stride, padding, groups):
    x, w = coded((2, 4, 9, 8), (4, 1, 1) if groups == 1 else (1,), (9, 8)), coded((8, 4 // groups, 3, 2), (8, 1, 1, 1), seed=1)
    bias = torch.randn(8)
    args = (stride, padding, 1, groups)
    assert_close(F.conv2d(x, w, bias, *args), F.conv2d(exact(x), exact(w), bias.double(), *args))


def test_a_factor_that_was_never_quantized_leaves_nothing_to_do_in_integers():
    x, w = coded((5, 7), (5, 1)), torch.randn(4, 7)
    with noting() as products:
        assert_close(F.linear(x, w), exact(x) @ w.double().T)
    assert products == []


def test_products_are_noted_with_the_accumulator_that_they_need():
    x, w = coded((5, 7), (1,), bound=3), coded((4, 7), (4, 1), bound=2, seed=1, name="w")
    with noting() as products:
        F.linear(x, w)
    (noted,) = products
    assert noted.product == Product("x", "w", 7, 3, 2)
    assert (noted.product.largest, noted.product.bits) == (42, 7)
    assert noted.seen == int((x.codes @ w.codes.T).abs().max()) <= 42


def test_sums_that_could_overflow_are_refused():
    x, w = (
        QuantizedTensor.of(torch.zeros(1, 2), torch.ones(1), None, 2**15),
        QuantizedTensor.of(torch.zeros(1, 2), torch.ones(1), None, 2**15),
    )
    with pytest.raises(qat.UsageError, match="33 bits"):
        F.linear(x, w)


def test_nothing_else_is_done_on_codes():
    x = coded((5, 7), (5, 1))
    with pytest.raises(TypeError, match="softmax is not done on codes"):
        torch.softmax(x, -1)
    with pytest.raises(TypeError, match="scales that can stand outside of it"):
        _ = x @ coded((7, 4), (7, 1))
    with pytest.raises(TypeError):
        _ = x + 1
