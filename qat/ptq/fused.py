"""Affine fake quantization of an activation in one pass over its memory: a few lines of C, compiled where there is a compiler.

Six operations in a row read and write a large activation six times. `torch.compile` makes one loop of them as well, but finds out in
every call whether the loop fits, which takes as long as the passes that it saves.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

from qat.functional.affine import fake_quantize_affine_
from qat.kernels import compile_cpp

log = logging.getLogger(__name__)
Kernel = Callable[[Tensor, Tensor, Tensor, int, int], None]
# Compiling takes a second, and an entry is done about 0.4 ns sooner.
WORTH_COMPILING = 1e10

# A comparison with NaN is false, so NaN stays NaN.
_SOURCE = """
#include <math.h>
#include <stddef.h>

static inline float one(float x, float step, float zero, float low, float high) {
    float code = rintf(x / step + zero);
    code = code < low ? low : code;
    code = code > high ? high : code;
    return (code - zero) * step;
}

extern "C" void quantize(float* x, const float* step, const float* zero, size_t rows, size_t columns, float low, float high) {
    if (columns == 1) {
        const float s = *step, z = *zero;
        for (size_t i = 0; i < rows; i++) x[i] = one(x[i], s, z, low, high);
        return;
    }
    for (size_t i = 0; i < rows; i++, x += columns)
        for (size_t j = 0; j < columns; j++) x[j] = one(x[j], step[j], zero[j], low, high);
}
"""


@functools.cache
def compiled_kernel() -> Kernel | None:
    """A function (x, scale, zero_point, qmin, qmax) that does what `fake_quantize_affine_` does, on a CPU; compiled once in a process.

    x is float32 and contiguous, (n,) with one scale or (n, C) with C of them. None where it cannot be compiled, or gives other bits.
    """
    try:
        kernel = _compiled()
    except (OSError, subprocess.SubprocessError) as error:
        log.info("search: activations are quantized in six passes; no compiler: %s", error)
        return None
    if all(_agrees(kernel, columns, rows) for columns in (1, 48) for rows in (523, 4099)):
        return kernel
    log.info("search: activations are quantized in six passes; one pass gives other bits here")
    return None


def _compiled() -> Kernel:
    """The function, bits not compared yet.

    Raises:
        OSError: there is no compiler, or what it made cannot be loaded.
        subprocess.SubprocessError: it took too long.
    """
    quantize = compile_cpp.load(_SOURCE).quantize
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
    quantize.argtypes, quantize.restype = (pointer, pointer, pointer, size, size, number, number), None

    def kernel(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> None:
        quantize(x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), x.numel() // len(scale), len(scale), qmin, qmax)

    return kernel


@torch.no_grad()
def _agrees(kernel: Kernel, columns: int, rows: int) -> bool:
    """Bit for bit, for values in and out of range, on codes and halfway between them."""
    generator = torch.Generator().manual_seed(rows)
    scale = torch.rand(columns, generator=generator) * 0.1 + 1e-3
    zero_point = torch.randint(0, 256, (columns,), generator=generator).float()
    halves = torch.randint(-100, 700, (rows, columns), generator=generator) / 2 - zero_point
    x = torch.cat([halves * scale, torch.randn(rows, columns, generator=generator) * 20])
    expected = fake_quantize_affine_(x.clone(), scale, zero_point, 0, 255, 1)
    kernel(x, scale, zero_point, 0, 255)
    return torch.equal(x, expected)


def fused_(kernel: Kernel, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """`fake_quantize_affine_` by the kernel, or by itself where there is no such case, or several threads would share the work.

    Args:
        kernel: see `compiled_kernel`.
        x: any shape; overwritten.
        scale: (x.shape[axis],), or (1,) for axis None.
        zero_point: likewise, in codes.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own, None = one for the tensor.
    """
    in_columns = len(scale) == 1 or (axis is not None and axis % x.ndim == x.ndim - 1)
    fits = in_columns and x.is_contiguous() and scale.is_contiguous() and zero_point.is_contiguous()
    if not fits or {x.dtype, scale.dtype, zero_point.dtype} != {torch.float32} or torch.get_num_threads() > 1:
        return fake_quantize_affine_(x, scale, zero_point, qmin, qmax, axis)
    kernel(x, scale, zero_point, qmin, qmax)
    return x
