"""Kernels in C++, as operators choose them. Oracle: plain tensor operations, bit for bit; sums within 1e-6 of the magnitudes added."""

import os
import stat
import subprocess

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat import kernels
from qat.functional.block_floats import BLOCK_FORMATS, block_float
from qat.kernels import CodeRange, LSQParams, Producer, cpu, operators, reference
from qat.utils import compile_cpp
from tests.errors import usage_error
from tests.gpu.kernel_cases import FORMS, SHARED, case, differences
from tests.kernels import calls
from tests.tiny import randn

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def loaded_again():
    """Kernels are compiled and compared again, in the test and after it."""

    def forget():
        cpu.available.cache_clear()
        cpu._library.cache_clear()

    forget()
    yield
    forget()


def tokens():
    """A tensor and a quantizer with offsets, with a step for each token."""
    torch.manual_seed(0)
    return case(*FORMS["tokens"], (-2, 1))


@pytest.mark.usefixtures("threads")
@pytest.mark.sample(80)
@pytest.mark.parametrize("name", SHARED)
def test_numbers_of_the_reference(name):
    function, *arguments = SHARED[name]
    torch.manual_seed(0)
    assert function(operators, *arguments) == []


def test_rows_that_are_no_sequence():
    x, *quantizer = tokens()
    rows = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert differences(operators, rows, *quantizer) == []


def falls_back():
    """Quantizers compute, without the kernels."""
    x, scale, before, after, grid = tokens()
    found = kernels.lsq(x, LSQParams(scale, before, after, None, grid))
    assert torch.equal(found, reference.lsq_forward(x, scale, before, after, grid))
    nvfp4 = BLOCK_FORMATS["nvfp4", 4]
    assert torch.equal(kernels.block_floats(x, nvfp4), block_float(x, nvfp4))


@pytest.mark.parametrize("kernel", ["lsq_forward", "round_blocks"])
def test_off_means_plain_operations(monkeypatch, kernel):
    monkeypatch.setattr(cpu, kernel, pytest.fail)
    kernels.use("off")
    try:
        falls_back()
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
    monkeypatch.setattr(compile_cpp, "_compile", pytest.fail)
    assert compile_cpp.load(SOURCE).answer() == 42


def test_nothing_is_run_from_a_folder_that_others_can_write_to(cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert compile_cpp.load(SOURCE).answer() == 42
    assert not os.listdir(cache)


@pytest.mark.usefixtures("cache", "loaded_again")
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_plain_operations_do(monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(OSError, match=r"\$CXX|fails"):
        compile_cpp.load(SOURCE)
    assert not cpu.available()
    falls_back()


@pytest.mark.usefixtures("loaded_again")
def test_a_compiler_that_takes_too_long_is_none(monkeypatch):
    def load(_):
        raise subprocess.TimeoutExpired("c++", 60)

    monkeypatch.setattr(compile_cpp, "load", load)
    assert not cpu.available()
    falls_back()


@pytest.mark.parametrize("n", [4, 6, 24])
def test_a_step_for_each_row_or_no_kernel(n):
    """Behind its last element a tensor of steps has what is another's."""
    x, _, _, _, grid = tokens()
    scale = torch.ones(n)
    assert calls.lsq_forward(x, scale, None, None, grid, module=cpu) is None
    with usage_error(r"^input of a quantizer \(3, 5, 24\): "):
        calls.lsq_forward(x, scale, None, None, grid)


@pytest.mark.parametrize("batch", [5, 6])
def test_scales_of_tokens_are_not_those_of_images(batch):
    """As many tokens as images, with a scale for each token."""
    x, scale = randn(batch, 6, 8), torch.linspace(0.5, 3, 6).view(1, 6, 1)
    assert torch.equal(kernels.statsq(x, scale, 4), F.statsq_with_scale(x, scale, 4))


def test_an_empty_batch():
    x, scale = torch.empty(0, 5, 8, requires_grad=True), torch.ones(5, requires_grad=True)
    F.lsq(x, scale, -2, 1, 1).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(scale.grad, torch.zeros(5))


@pytest.mark.usefixtures("loaded_again")
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
)
def test_what_torch_makes_by_default_is_nothing_to_the_kernels(dtype, device):
    """They write through pointers: an array of another dtype or device would be too small, or nowhere."""
    x, scale, *others = tokens()
    grad, unsigned, default = randn(*x.shape), CodeRange(0, 7, -2), torch.get_default_dtype()
    probs = x.clamp(-9, 9).softmax(-1)
    expected, _ = calls.softmax_reference(grad, probs, scale, unsigned, 1.0)
    how = {"dequantized": torch.float32, "producer": Producer("softmax", factor=1.0)}
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            assert cpu.available()
            assert differences(operators, x, scale, *others, grad=grad) == []
            found = calls.lsq_backward(grad, probs, scale, None, unsigned, **how)
    finally:
        torch.set_default_dtype(default)
    assert_close(found.x, expected)
