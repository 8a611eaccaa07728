"""Triton's kernels without a GPU: their numbers by Triton's interpreter, and what its compiler makes of them for one.

Oracle: `reference`, bit for bit; sums within 1e-6 of the magnitudes added. Of the compiler's output: IEEE division, and no product
contracted with a sum; either would change bits, and the interpreter does not show it.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from qat.kernels import gpu, tiles
from tests.conftest import ROOT
from tests.kernels.gpu_cases import CASES, FORMS, case

triton = pytest.importorskip("triton")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("interpreted", [pytest.param("1", marks=pytest.mark.long), pytest.param("0", marks=NO_GPU)])
def test_numbers_of_the_reference(interpreted):
    """All cases in one process: it is its start that takes time."""
    environment = {**os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.gpu_cases"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == CASES.keys()
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_without_a_device():
    assert gpu.available() == torch.cuda.is_available()
    assert gpu.lsq_forward(torch.ones(2, 3, 4), torch.ones(3), None, None, gpu.Grid(-2, 1, 1)) is None


class NoDriver:
    """In place of a Hopper GPU's driver: launches prepare arguments and compile, and go no further."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 99  # kernels are kept by device: no real one shall find these

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """PTX of every kernel that is launched."""
    found = []

    def compile_only(kernel, programs, *args, **constants):
        found.append(kernel.warmup(*args, grid=programs, **constants, **gpu.OPTIONS).asm["ptx"])

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "device_type", lambda: "cpu")
    monkeypatch.setattr(gpu, "_launch", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver())
    return found


def rows(x, scale, before, after, grid, sign=None):
    gpu.lsq_forward(x, scale, before, after, grid, sign=sign)
    shape = None if after is None else after.shape
    gpu.lsq_gradients(x, x, scale, before, grid, sign=sign, after_shape=shape, levels=after is not None, after=after)


LAUNCHES = {
    "offsets": lambda: rows(*case(*FORMS["tokens"], (-2, 1))),
    "no offsets": lambda: rows(*case(*FORMS["heads"], (0, 3))),
    "by column": lambda: rows(*case(*FORMS["channels"], (-2, 1))),
    "sign": lambda: rows(*case(*FORMS["pixels"], (-2, 1)), torch.ones(())),
    "bfloat16": lambda: rows(torch.ones(2, 3, 8, dtype=torch.bfloat16), torch.ones(3), None, None, gpu.Grid(-2, 1, 1)),
    "weights": lambda: gpu.statsq_forward(torch.ones(3, 8), torch.ones(3, 1), 2),
    "probabilities": lambda: gpu.probs_gradients(torch.ones(2, 3, 3), torch.ones(2, 3, 3), torch.ones(3), gpu.Grid(0, 3, -2), 0.3),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_machine_code(compiled, name):
    LAUNCHES[name]()
    assert len(compiled) == (1 if name in {"weights", "probabilities"} else 2)
    for ptx in compiled:
        assert set(re.findall(r"\bdiv[.\w]*f32", ptx)) == {"div.rn.f32"}
        assert not re.search(r"\bfma\.|\.ftz|\batom\.|\bred\.|\bmad\.\w+\.f32", ptx)
