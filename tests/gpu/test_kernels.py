"""Triton's kernels: their numbers on the device or in Triton's interpreter, and what its compiler makes of them for a Hopper GPU.

Oracle: `reference`, bit for bit; sums within 1e-6 of the magnitudes added. Of the compiler's output: IEEE division, and no product
contracted with a sum but where a quotient is corrected; either would change bits, and the interpreter does not show it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._inductor import metrics

from qat.functional.block_floats import BLOCK_FORMATS, compute_tensor_scale, round_blocks
from qat.kernels import CodeRange, gpu, operators, reference, tiles
from qat.lit.compiled import compile_options, register_decompositions
from tests.gpu.kernel_cases import CASES, case, same
from tests.kernels import calls
from tests.tiny import identical

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_the_reference(kernels_on, name):
    function, *arguments = CASES[name]
    torch.manual_seed(0)
    with torch.device(kernels_on), np.errstate(all="ignore"):
        assert function(gpu, *arguments) == []


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.available.cache_clear()
    try:
        has_triton = importlib.util.find_spec("triton") is not None
        # Triton's interpreter replaces a device.
        assert gpu.available() is (has_triton and tiles.device_type() == "cpu")
    finally:
        gpu.available.cache_clear()


def both_passes(device, shape=(4, 300, 64)):
    """A function of nothing that runs both passes of LSQ, its inputs, and what the reference gives."""
    torch.manual_seed(0)
    with torch.device(device):
        x, scale, before, after, grid = case(shape, 1, 1, (-2, 1))
        grad = torch.randn(shape)
    given = (grad, x, scale, before, grid)
    expected = reference.lsq_backward(*given, after_shape=after.shape)
    levels = reference.lsq_forward(x, scale, before, after, grid)

    def run():
        return calls.gpu_backward(*given, dequantized=torch.float32, after=after)

    return run, (expected, levels)


def test_in_a_cuda_graph(device):
    run, (expected, levels) = both_passes(device)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for tensor in found[:5]:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    eager = run()
    assert identical(found[:5], eager[:5])
    assert same(found.dequantized, levels)
    assert same(found.x, expected.x)


def test_on_a_device_that_is_not_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device alone")
    run, (expected, levels) = both_passes("cuda:1")
    assert torch.cuda.current_device() == 0
    found = run()
    assert found.x.device == torch.device("cuda:1")
    assert same(found.dequantized, levels)
    assert same(found.x, expected.x)


def test_the_same_bits_in_every_run(device):
    run, _ = both_passes(device, (64, 197, 192))
    first = [tensor.clone() for tensor in run()[:5]]
    for _ in range(5):
        assert identical(run()[:5], first)


@pytest.mark.parametrize(
    ("shape", "axis"), [((140_000, 1024), None), ((9_000_000, 16), None), ((2, 70_000, 600), 1)]
)
def test_more_than_65535_tiles(device, shape, axis):
    grid = CodeRange(-2, 1, axis)
    with torch.device(device):
        x, scale = torch.randn(shape), torch.full((1 if axis is None else shape[axis],), 0.7)
        found = calls.gpu_forward(x, scale, None, None, grid)
        assert same(found, reference.lsq_forward(x, scale, None, None, grid))
        assert same(
            calls.gpu_backward(x, x, scale, None, grid).x,
            reference.lsq_backward(x, x, scale, None, grid).x,
        )


def test_more_elements_than_32_bits_count(device):
    free, _ = torch.cuda.mem_get_info()
    rows, length = 2**21 + 3, 1024
    if free < 5 * 2 * rows * length:
        pytest.skip("less than 22 GB of memory are free")
    x = torch.empty(rows, length, device=device, dtype=torch.bfloat16).normal_()
    quantizer = torch.full((1,), 0.7, device=device), None, None, CodeRange(-2, 1, None)
    found = calls.gpu_forward(x, *quantizer)
    assert same(found[-5:].contiguous(), reference.lsq_forward(x[-5:].contiguous(), *quantizer))


@pytest.mark.parametrize("length", [192, 197])
@pytest.mark.parametrize(("name", "bits"), BLOCK_FORMATS)
def test_blocks_of_floats_are_compiled_to_one_pass(device, name, bits, length):
    form = BLOCK_FORMATS[name, bits]
    x = torch.randn(3, 50, length, device=device, dtype=torch.bfloat16)
    t = compute_tensor_scale(x, form)
    register_decompositions()
    for grad in (None, torch.randn_like(x)):
        torch._dynamo.reset()
        metrics.reset()
        run = torch.compile(operators.round_blocks, fullgraph=True, options=compile_options())
        found = run(x, t, grad, bits)
        assert torch.equal(found, round_blocks(x, form, t, grad))
        assert metrics.generated_kernel_count == 1


def test_a_kernel_is_looked_up_once_for_what_it_depends_on(monkeypatch):
    triton_kernels = pytest.importorskip("qat.kernels.triton_kernels")
    source, compiled = mock.MagicMock(arg_names=["x", "y", "n", "B", "A"]), mock.MagicMock()
    source.__getitem__.return_value.return_value = compiled
    monkeypatch.setattr(triton_kernels, "mine", source, raising=False)
    monkeypatch.setattr(gpu, "_COMPILED", {})
    x = torch.ones(9)
    for given, n in ((x, 3), (x[1:], 3), (x.double(), 3), (x, 4), (None, 3)) * 2:
        gpu._launch("mine", (5, 2), (x, given), n, A=1, B=2, num_warps=4)
    assert source.__getitem__.return_value.call_count == 5
    assert compiled.__getitem__.call_args_list == [mock.call((5, 2, 1, 1))] * 5
    launches = compiled.__getitem__.return_value.call_args_list
    assert launches[1] == mock.call(x.data_ptr(), x.data_ptr() + 4, 3, 2, 1)
    assert launches[4] == mock.call(x.data_ptr(), None, 3, 2, 1)


@pytest.mark.long
def test_machine_code():
    """Compiled ahead of time for a Hopper GPU, which need not be there; in a process that does not interpret.

    What is written in half precision is rounded to nearest, half to even.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.machine_code"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {len(kernels) for kernels in found.values()} == {1, 2, 3}
    for name, kernels in found.items():
        for code in kernels:
            # A logarithm, an exponential, an error function and a root are made of such products, by a library.
            ptx = (
                re.sub(r"(fma\.rn|abs|ex2\.approx|rsqrt\.approx)\.ftz\.f32", "", code)
                if re.match("attention|gelu|norm", name)
                else code
            )
            # A quotient is corrected by two of them unless its absolute value is large.
            assert len(re.findall(r"\bfma\.rn\.f32", ptx)) == 2 * len(
                re.findall(r"\babs\.f32", ptx)
            ), name
            ptx = ptx.replace("fma.rn.f32", "")
            assert set(re.findall(r"\bcvt\.(\w+)\.(?:bf16|f16)\w*\.f32", ptx)) <= {"rn"}, name
            assert bool(re.search(r"\bcvt\.rn\.b?f16", ptx)) == ("float16" in name), name
            assert set(re.findall(r"\bdiv[.\w]*f32", ptx)) == {"div.rn.f32"}, name
            assert not re.search(r"\bfma\.|\.ftz|\batom\.|\bred\.|\bmad\.\w+\.f32", ptx), name
