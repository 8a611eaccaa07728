"""One pass instead of six. Oracle: `fake_quantize_affine_`, bit for bit."""

import pytest
import torch

from qat.functional.affine import fake_quantize_affine_
from qat.ptq import fused
from qat.ptq.fused import compiled_kernel, fused_


@pytest.fixture
def kernel():
    found = compiled_kernel()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def called(kernel):
    """The kernel, and a list of its calls."""
    calls = []

    def counted(*args):
        calls.append(args)
        kernel(*args)

    return counted, calls


def tensors(shape, n_scales, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n_scales, generator=generator) / 8 + 1e-3
    zero_point = torch.randint(-8, 8, (n_scales,), generator=generator).float()
    return torch.randn(shape, generator=generator) * 3, scale, zero_point


@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 7), None), ((2, 3, 17, 17), None), ((3, 5, 7), -1), ((3, 5, 7), 2), ((9, 64), 1)])
@pytest.mark.parametrize(("qmin", "qmax"), [(0, 255), (-8, 7)])
def test_equal_to_the_last_bit(kernel, shape, axis, qmin, qmax):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, scale, zero_point = tensors(shape, 1 if axis is None else shape[axis])
        # On codes, and halfway between two.
        x.view(-1)[: len(x.view(-1)) // 2] = torch.arange(len(x.view(-1)) // 2) / 2 * scale[0]
        counted, calls = called(kernel)
        expected = fake_quantize_affine_(x.clone(), scale, zero_point, qmin, qmax, axis)
        assert fused_(counted, x, scale, zero_point, qmin, qmax, axis) is x
        assert torch.equal(x, expected)
        assert len(calls) == 1
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite(kernel):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    one = torch.ones(1)
    fused_(kernel, x, one, 0 * one, -8, 7, None)
    assert x[0].isnan()
    assert x[1:].tolist() == [7.0, -8.0, 0.0]


@pytest.mark.parametrize("case", ["strided", "other axis", "double", "threads"])
def test_what_the_kernel_has_no_case_for_goes_the_other_way(kernel, case, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 if case == "threads" else 1)
    axis = 1 if case == "other axis" else None
    x, scale, zero_point = tensors((4, 6, 8), 6 if axis else 1)
    x = x.transpose(0, 2) if case == "strided" else x.double() if case == "double" else x
    counted, calls = called(kernel)
    expected = fake_quantize_affine_(x.clone(), scale, zero_point, 0, 15, axis)
    assert torch.equal(fused_(counted, x, scale, zero_point, 0, 15, axis), expected)
    assert not calls


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_is_no_kernel(compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    assert compiled_kernel.__wrapped__() is None


def test_a_kernel_with_other_bits_is_not_used(monkeypatch):
    """As a compiler would make it that multiplies by 1 / scale."""
    monkeypatch.setattr(fused, "_SOURCE", fused._SOURCE.replace("x / step", "x * (1 / step)"))
    assert compiled_kernel.__wrapped__() is None
