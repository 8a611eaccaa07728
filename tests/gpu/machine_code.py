"""Prints, as JSON, what Triton's compiler makes of every kernel for a Hopper GPU: PTX by launch. Needs Triton, no GPU."""

import functools
import json
import sys
import tempfile
from unittest import mock

import torch
import triton

from qat.kernels import Producer, attention, gpu, tiles, triton_attention, triton_kernels
from tests.gpu.kernel_cases import FORMS, case
from tests.kernels import calls

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NoDriver:
    """In place of a Hopper GPU's driver: launches prepare arguments and compile, and go no further."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 99  # kernels are kept by device: no real one shall find these

    def get_current_stream(self, device):
        return 0


def rows(x, scale, before, after, grid, sign=None):
    calls.gpu_forward(x, scale, before, after, grid, sign=sign, dtype=x.dtype)
    dequantized = None if after is None else x.dtype
    how = {"sign": sign, "dequantized": dequantized, "after": after}
    calls.gpu_backward(x, x, scale, before, grid, **how)


def through(made, x, dtype):
    steps, before, grid = torch.ones(x.shape[1]), torch.ones(x.shape[-1]), gpu.CodeRange(0, 3, 1)
    norm = (before, before) if made.kind == "norm" else (None, None)
    how = {"dequantized": dtype, "norm": norm, "producer": made}
    calls.gpu_backward(x.to(dtype), x, steps, before, grid, **how)


def probabilities(dtype):
    grad, scores = (torch.ones(2, 3, 3, dtype=dtype) for _ in range(2))
    how = {"out": grad, "dequantized": dtype, "producer": Producer("scores", factor=0.3)}
    calls.gpu_backward(grad, scores, torch.ones(3), None, gpu.CodeRange(0, 3, -2), **how)


def halves(dtype):
    rows(torch.ones(2, 3, 8, dtype=dtype), torch.ones(3), None, None, gpu.CodeRange(-2, 1, 1))


def weights(dtype):
    gpu.statsq_forward(torch.ones(3, 8), torch.ones(3, 1), 2, dtype)


def attentions(dtype):
    q, k, v = torch.ones(2, 197, 3 * 192, dtype=dtype).chunk(3, -1)
    settings = torch.ones(197), 0, 3, -2, False, 3, 0.125
    out, sums = attention.attention_forward(q, k, v, *settings)
    attention.attention_backward(out, sums, q, k, v, *settings)


LAUNCHES = {
    "offsets": lambda: rows(*case(*FORMS["tokens"], (-2, 1))),
    "no offsets": lambda: rows(*case(*FORMS["heads"], (0, 3))),
    "by column": lambda: rows(*case(*FORMS["channels"], (-2, 1))),
    "sign": lambda: rows(*case(*FORMS["pixels"], (-2, 1)), torch.ones(())),
    "weights": lambda: weights(torch.float32),
    "scales of weights": lambda: gpu.statsq(torch.ones(3, 8), 2, torch.float32),
    "norm, bfloat16": lambda: through(
        Producer("norm", 1e-5), torch.ones(2, 197, 192), torch.bfloat16
    ),
    "gelu, bfloat16": lambda: through(
        Producer("gelu"), torch.ones(2, 197, 768, dtype=torch.bfloat16), torch.bfloat16
    ),
    "probabilities": lambda: probabilities(torch.float32),
    "attention": lambda: attentions(torch.float32),
}
for name, dtype in HALVES.items():
    LAUNCHES[name] = functools.partial(halves, dtype)
    for kind, launch in (
        ("weights", weights),
        ("probabilities", probabilities),
        ("attention", attentions),
    ):
        LAUNCHES[f"{kind}, {name}"] = functools.partial(launch, dtype)


def main():
    found = {name: [] for name in LAUNCHES}
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        for name, launch in LAUNCHES.items():
            keep = found[name].append

            def compile_only(name, programs, tensors, *numbers, keep=keep, **constants):
                kernel = getattr(triton_attention, name, None) or getattr(triton_kernels, name)
                keep(
                    kernel.warmup(
                        *tensors, *numbers, grid=programs, **{**gpu.OPTIONS, **constants}
                    ).asm["ptx"]
                )

            with (
                mock.patch.object(tiles, "device_type", return_value="cpu"),
                mock.patch.object(gpu, "_launch", compile_only),
                mock.patch.object(triton.runtime.driver, "_active", NoDriver()),
            ):
                launch()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
