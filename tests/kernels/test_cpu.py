"""Kernels in C++. Oracle: the same as plain tensor operations; forward bit for bit."""

import os
import stat

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat import kernels
from qat.errors import UsageError
from qat.kernels import CodeRange, LSQParams, cpu, operators, reference
from qat.utils import compile_cpp
from tests.kernels import calls
from tests.tiny import randn

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


def offset(*shape):
    return 0.3 * randn(*shape, seed=7)


# x, number of steps, offset in front, offset behind, grid
CASES = {
    "token": (2 * randn(2, 5, 19), 5, offset(19), offset(19), CodeRange(-2, 1, -2)),
    "token, no offsets": (2 * randn(2, 5, 19), 5, None, None, CodeRange(-4, 3, 1)),
    "behind alone": (2 * randn(2, 5, 19), 5, None, offset(19), CodeRange(-2, 1, -2)),
    "channel": (2 * randn(2, 5, 19), 19, offset(19), offset(19), CodeRange(-8, 7, -1)),
    "channel, no offsets": (2 * randn(2, 5, 19), 19, None, None, CodeRange(0, 15, 2)),
    "query": (randn(3, 2, 6, 7).softmax(-1), 6, None, None, CodeRange(0, 3, -2)),
    "map": (randn(2, 3, 8, 8), 3, offset(8, 8), offset(8, 8), CodeRange(-128, 127, 1)),
    "output row": (randn(12, 3, 4, 4), 12, None, None, CodeRange(-128, 127, 0)),
    "columns of a wider tensor": (
        randn(2, 5, 57)[..., 19:38],
        5,
        offset(19),
        None,
        CodeRange(-2, 1, -2),
    ),
    "rows that are no sequence": (
        randn(5, 2, 19).transpose(0, 1),
        5,
        offset(19),
        None,
        CodeRange(-2, 1, -2),
    ),
    "half steps": (2 * randn(2, 5, 19), 5, offset(19), offset(19), CodeRange(-2, 1, -2, half=True)),
    "half steps, ties": (
        randn(2, 5, 19).round() / 2,
        1,
        None,
        None,
        CodeRange(-4, 3, None, half=True),
    ),
    "half precision": (randn(2, 5, 19).bfloat16(), 5, offset(19), offset(19), CodeRange(-2, 1, -2)),
}


def steps(n):
    return 0.05 + randn(n, seed=3).abs()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", CASES)
def test_lsq_agrees(name):
    x, n, before, after, grid = CASES[name]
    scale, grad = steps(n), randn(*x.shape, seed=5)
    expected = reference.lsq_forward(x, scale, before, after, grid)
    assert torch.equal(calls.lsq_forward(x, scale, before, after, grid), expected)
    shape = None if after is None else after.shape
    wanted = reference.lsq_backward(grad, x, scale, before, grid, after_shape=shape)
    found = calls.lsq_backward(grad, x, scale, before, grid, dequantized=torch.float32, after=after)
    assert torch.equal(found.x, wanted.x.to(x.dtype))
    assert torch.equal(found.dequantized, expected)
    assert_close(found[1:4], wanted[1:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["token", "channel", "map"])
def test_the_gradient_may_be_overwritten(name):
    x, n, before, after, grid = CASES[name]
    scale, grad = steps(n), randn(*x.shape, seed=5)
    apart = calls.lsq_backward(grad, x, scale, before, grid, after=after)
    same = calls.lsq_backward(grad, x, scale, before, grid, after=after, out=grad)
    assert same.x is grad
    assert all(torch.equal(a, b) for a, b in zip(apart[:4], same[:4], strict=True))


@pytest.mark.parametrize("sign", [1.0, 0.0])
def test_the_sign_is_read_off_a_tensor(sign):
    x, n, before, after, grid = CASES["map"]
    plain = CodeRange(-128, 127, 1) if sign else CodeRange(0, 255, 1)
    found = calls.lsq_forward(x, steps(n), before, after, grid, sign=torch.tensor(sign))
    assert torch.equal(found, reference.lsq_forward(x, steps(n), before, after, plain))
    backward = calls.lsq_backward(
        grad := randn(*x.shape), x, steps(n), before, grid, sign=torch.tensor(sign)
    )
    assert torch.equal(backward.x, reference.lsq_backward(grad, x, steps(n), before, plain)[0])


def test_ties_the_ends_of_the_range_and_what_is_no_number():
    x = torch.tensor([
        [-2.5, -2.0, -1.5, -0.5, 0.5, 1.0, 1.5, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45]
    ])
    for grid in (CodeRange(-2, 1, -2), CodeRange(0, 3, -2)):
        scale = torch.ones(1)
        assert_close(
            calls.lsq_forward(x, scale, None, None, grid),
            reference.lsq_forward(x, scale, None, None, grid),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
        ours, theirs = (
            f(torch.ones_like(x), x, scale, None, grid)[0]
            for f in (calls.lsq_backward, reference.lsq_backward)
        )
        assert torch.equal(ours, theirs)
    assert (
        calls
        .lsq_forward(x, torch.tensor([torch.nan]), None, None, CodeRange(-2, 1, -2))
        .isnan()
        .all()
    )
    assert torch.equal(
        calls.lsq_forward(x[:, :6], torch.zeros(1), None, None, CodeRange(-2, 1, -2)),
        torch.tensor([[-2, -2, -2, -2, 1, 1]]) * 1e-5,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_statsq_agrees(bits):
    w = torch.cat([randn(7, 33), torch.zeros(1, 33)])
    scale = 2 * w.abs().mean(1, keepdim=True)
    assert torch.equal(
        operators.statsq_forward(w, scale, bits, torch.float32),
        reference.statsq_forward(w, scale, bits),
    )


def test_probabilities_agree():
    probs, grid = randn(2, 3, 6, 7).softmax(-1), CodeRange(0, 3, -2)
    grad, scale = randn(2, 3, 6, 7, seed=1), steps(6)
    of_scores, of_scale, quantized = calls.softmax_backward(grad, probs, scale, grid, 0.125)
    expected, expected_scale = calls.softmax_reference(grad, probs, scale, grid, 0.125)
    assert_close(of_scores, expected, rtol=1e-5, atol=1e-7)
    assert_close(of_scale, expected_scale, rtol=1e-5, atol=1e-6)
    assert torch.equal(quantized, reference.lsq_forward(probs, scale, None, None, grid))


def test_off_means_plain_operations(monkeypatch):
    monkeypatch.setattr(cpu, "lsq_forward", pytest.fail)
    kernels.use("off")
    try:
        x, n, before, after, grid = CASES["token"]
        found = kernels.lsq(x, LSQParams(steps(n), before, after, None, grid))
        assert torch.equal(found, reference.lsq_forward(x, steps(n), before, after, grid))
    finally:
        kernels.use("auto")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qat"


SOURCE = 'extern "C" int answer() { return 42; }'


def test_what_is_compiled_is_kept(cache, monkeypatch):
    assert compile_cpp.load(SOURCE).answer() == 42
    (library,) = cache.iterdir()
    assert not library.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    monkeypatch.setattr(compile_cpp, "_compiled", pytest.fail)
    assert compile_cpp.load(SOURCE).answer() == 42


def test_nothing_is_run_from_a_folder_that_others_can_write_to(cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert compile_cpp.load(SOURCE).answer() == 42
    assert not os.listdir(cache)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_plain_operations_do(monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(OSError, match=r"neither \$CXX nor c\+\+|fails"):
        compile_cpp.load(SOURCE)
    cpu.available.cache_clear()
    cpu._library.cache_clear()
    try:
        assert not cpu.available()
        x, n, before, after, grid = CASES["token"]
        found = kernels.lsq(x, LSQParams(steps(n), before, after, None, grid))
        assert torch.equal(found, reference.lsq_forward(x, steps(n), before, after, grid))
    finally:
        cpu.available.cache_clear()
        cpu._library.cache_clear()


@pytest.mark.parametrize("n", [4, 6, 19])
def test_a_step_for_each_row_or_no_kernel(n):
    """Behind its last element a tensor of steps has what is another's."""
    x, grid = CASES["token, no offsets"][0], CodeRange(-4, 3, 1)
    assert cpu.lsq_forward(x, steps(n), None, None, None, *grid, torch.float32) is None
    with pytest.raises(UsageError, match=r"^input of a quantizer \(2, 5, 19\)"):
        calls.lsq_forward(x, steps(n), None, None, grid)


def test_an_empty_batch():
    x, scale = torch.empty(0, 5, 8, requires_grad=True), torch.ones(5, requires_grad=True)
    F.lsq(x, scale, -2, 1, 1).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(scale.grad, torch.zeros(5))


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
)
def test_what_torch_makes_by_default_is_nothing_to_the_kernels(dtype, device):
    """They write through pointers: an array of another dtype or device would be too small, or nowhere."""
    x, scale, before, grad = (
        randn(7, 5, 33),
        randn(5, seed=1).abs() + 0.1,
        offset(33),
        randn(7, 5, 33, seed=2),
    )
    codes, default = CodeRange(-4, 3, 1), torch.get_default_dtype()
    expected = reference.lsq_backward(grad, x, scale, before, codes, after_shape=before.shape)
    cpu.available.cache_clear()
    cpu._library.cache_clear()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            assert cpu.available()
            found = calls.lsq_backward(
                grad, x, scale, before, codes, after=before, dequantized=torch.float32
            )
            made = calls.lsq_forward(x, scale, before, before, codes)
            probs = calls.softmax_backward(grad, x.softmax(-1), scale, CodeRange(0, 7, -2), 1.0)
    finally:
        torch.set_default_dtype(default)
        cpu.available.cache_clear()
        cpu._library.cache_clear()
    for name in ("x", "scale", "before", "after"):
        assert_close(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.dequantized, made)
    assert torch.equal(made, reference.lsq_forward(x, scale, before, before, codes))
    assert_close(
        probs[0], calls.softmax_reference(grad, x.softmax(-1), scale, CodeRange(0, 7, -2), 1.0)[0]
    )
