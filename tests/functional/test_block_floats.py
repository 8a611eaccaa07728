"""Floats in blocks. Oracles: the values of E2M1 and E4M3 listed one by one, torch's cast to E4M3, torchao's casts."""

import itertools

import pytest
import torch

from qat import kernels
from qat.functional.block_floats import (
    BLOCK_FORMATS,
    block_float,
    block_float_codes,
    float_values,
    nearest_float,
    sorted_index,
)
from qat.functional.packing import pack_pairs
from tests.tiny import randn

MXFP4, MXFP8, NVFP4 = BLOCK_FORMATS["mxfp", 4], BLOCK_FORMATS["mxfp", 8], BLOCK_FORMATS["nvfp4", 4]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FORMATS = pytest.mark.parametrize("form", BLOCK_FORMATS.values(), ids=["mxfp4", "mxfp8", "nvfp4"])
NAN, INF = float("nan"), float("inf")


def same(a, b):
    """Bit for bit but for the kind of a NaN."""
    return torch.equal(a.nan_to_num(77.0), b.nan_to_num(77.0)) and torch.equal(a.isnan(), b.isnan())


def scale_of_each(factors, t, form):
    """The scale of each element of whole blocks."""
    scales = factors if t is None else factors * t
    return scales.repeat_interleave(form.block_size, -1)


def test_all_16_codes_of_e2m1():
    values = float_values(torch.arange(16, dtype=torch.uint8), MXFP4)
    assert values.tolist() == E2M1 + [-v for v in E2M1]
    assert values[8].signbit()
    assert torch.equal(nearest_float(values, MXFP4), values)
    assert sorted_index(values, MXFP4).tolist() == [*range(8), *range(0, -8, -1)]


def test_all_values_of_e4m3():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = ~values.isnan()
    assert torch.equal(float_values(codes, MXFP8)[finite], values[finite])
    assert torch.equal(nearest_float(values, MXFP8)[finite], values[finite])
    assert sorted_index(values, MXFP8)[:127].tolist() == list(range(127))
    x = torch.cat([randn(5000) * 100, randn(5000) / 100]).clamp(-448, 448)
    assert torch.equal(nearest_float(x, MXFP8), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("low", "high"), list(itertools.pairwise(E2M1)))
def test_ties_go_to_the_even_code(low, high):
    even = low if E2M1.index(low) % 2 == 0 else high
    middle = torch.tensor((low + high) / 2)
    around = middle.nextafter(torch.tensor([0.0, middle, 9.0]))
    assert nearest_float(around, NVFP4).tolist() == [low, even, high]
    assert nearest_float(-around, NVFP4).tolist() == [-low, -even, -high]


@FORMATS
@pytest.mark.parametrize("length", [1, 15, 16, 32, 33, 75])
def test_codes_and_scales_give_the_values_and_a_short_block_is_a_block(form, length):
    x = randn(3, length) * torch.tensor([[1e-3], [1.0], [30.0]])
    codes, factors, t = block_float_codes(x, form)
    assert (codes.dtype, codes.shape) == (torch.uint8, x.shape)
    assert factors.shape == (3, -(-length // form.block_size))
    scales = scale_of_each(factors, t, form)[:, :length]
    assert torch.equal(float_values(codes, form) * scales, block_float(x, form))
    rest = length % form.block_size
    if rest and t is None:
        assert torch.equal(block_float(x, form)[:, -rest:], block_float(x[:, -rest:], form))


@FORMATS
def test_zeros_and_scales_that_underflow_give_zeros(form):
    tiny = 2.0**-127 if not form.two_level else 2.0**-20
    x = torch.zeros(2, form.block_size * 2)
    x[1] = tiny
    x[0, -1] = 1.0 if form.two_level else 0.0
    y, codes = block_float(x, form), block_float_codes(x, form)[0]
    assert not y[:, : form.block_size].any()
    assert not y[1].any()
    assert not codes[1].any()
    assert not block_float(torch.zeros(3, 5), form).any()


@FORMATS
def test_nan_and_infinity(form):
    x = torch.ones(2, form.block_size * 2)
    x[0, 0] = NAN
    y = block_float(x, form)
    assert y[0, : form.block_size].isnan().all()
    assert y.isnan().all() == form.two_level
    assert block_float_codes(x, form)[1][0, 0].isnan()
    x[0, 0] = -INF
    y = block_float(x, form)
    if form.two_level:
        assert y.isnan().all()
        return
    assert y[0, 0] == -INF
    assert not y[0, 1 : form.block_size].any()
    assert y[1].eq(1).all()


@FORMATS
def test_the_gradient_passes_but_where_a_value_saturates(form):
    x = randn(8, 3 * form.block_size).requires_grad_()
    y = block_float(x, form)
    grad = randn(*x.shape)
    y.backward(grad)
    _, factors, t = block_float_codes(x.detach(), form)
    beyond = x.detach().abs() / scale_of_each(factors, t, form) > form.max_value
    assert 0 < beyond.sum() < 0.1 * x.numel()
    assert torch.equal(x.grad, torch.where(beyond, 0.0, grad))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", ["plain", "small and large", "odd values", "ties", "apart in memory", "none"]
)
def test_kernels_give_the_bits_of_the_formula(form, dtype, case):
    x = randn(6, 77)
    if case == "small and large":
        x = x * torch.logspace(-44, 38, 6)[:, None]
    elif case == "odd values":
        x[0, 0], x[1, 40], x[2], x[3, :16] = NAN, INF, 0.0, -0.0
    elif case == "ties":
        x = torch.arange(-231, 231).view(6, 77) / 32
    elif case == "apart in memory":
        x = randn(77, 6).T
    elif case == "none":
        x = x[:0]
    x, grad = x.to(dtype).requires_grad_(), randn(*x.shape, seed=1).to(dtype)
    y, y_kernel = block_float(x, form), kernels.block_floats(x, form)
    assert (y_kernel.dtype, y_kernel.shape) == (dtype, x.shape)
    assert same(y, y_kernel)
    assert torch.equal(y.signbit(), y_kernel.signbit()) or y.isnan().any()
    assert same(*(torch.autograd.grad(out, x, grad)[0] for out in (y, y_kernel)))


@FORMATS
def test_it_can_be_differentiated_twice(form):
    x = randn(3, 40).double().requires_grad_()
    y = block_float(x, form).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].any()


@pytest.mark.skipif(torch.__version__ < "2.15", reason="2.11 cannot map a view of another dtype")
@FORMATS
def test_it_can_be_mapped(form):
    x = randn(4, 3, 40)
    assert torch.equal(
        torch.func.vmap(lambda one: block_float(one, form))(x),
        torch.stack([block_float(one, form) for one in x]),
    )


@FORMATS
def test_torchao_casts_to_the_same_bytes(form):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = randn(64, 96) * torch.logspace(-3, 3, 64)[:, None] if not form.two_level else randn(64, 96)
    codes, factors, t = block_float_codes(x, form)
    if form.two_level:
        assert nvfp4.per_tensor_amax_to_scale(x.abs().amax()) == t
        theirs = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=t)
        scale = factors.to(torch.float8_e4m3fn)
    else:
        theirs = mx.MXTensor.to_mx(
            x, torch.float8_e4m3fn if form.bits == 8 else torch.float4_e2m1fn_x2
        )
        scale = factors.to(torch.float8_e8m0fnu)
    qdata = pack_pairs(codes) if form.bits == 4 else codes
    assert torch.equal(theirs.qdata.view(torch.uint8), qdata)
    assert torch.equal(theirs.scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(theirs.dequantize(torch.float32), block_float(x, form))
