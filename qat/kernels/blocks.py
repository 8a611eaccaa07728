"""Floats in blocks that share a scale, in one pass over memory on a CPU; elsewhere by the formula, which compilers see."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.functional.block_floats import (
    BLOCK_FORMATS,
    BlockFloatFunction,
    BlockFormat,
    block_float_backward,
    block_float_forward,
    tensor_scale,
)
from qat.functional.ste import in_dtype
from qat.kernels import compile_cpp
from qat.kernels.library import operator
from qat.kernels.rows import PLAIN

_P, _N, _F = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float


@functools.cache
def _library() -> Any:
    """The function of blocks.cpp, None where it cannot be had, or gives other bits than the formula."""
    try:
        function = compile_cpp.load(Path(__file__).with_name("blocks.cpp").read_text()).round_blocks
    except (OSError, subprocess.SubprocessError):
        return None
    function.argtypes, function.restype = (_P, _P, _P, _N, _N, _N, _F, _F, _F, _P, ctypes.c_int), None
    x = torch.linspace(-9, 9, 3 * 77, dtype=torch.float32, device="cpu").reshape(3, 77)
    for form in BLOCK_FORMATS.values():
        t = tensor_scale(x, form)
        if not torch.equal(_run(function, x, t, None, form), block_float_forward(x, form, t)):
            return None
    return function


def _run(function: Any, x: Tensor, t: Tensor | None, grad: Tensor | None, form: BlockFormat) -> Tensor:
    x, grad = x.float().contiguous(), None if grad is None else grad.float().contiguous()
    out, length = torch.empty_like(x), x.shape[-1]
    pointers = (None if one is None else one.data_ptr() for one in (grad, out))
    function(
        x.data_ptr(), *pointers, x.numel() // length, length, form.block, 2.0**-form.mantissa, 2.0**form.lowest, form.highest,
        None if t is None else t.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def round_blocks_formula(x: Tensor, t: Tensor | None, grad: Tensor | None, name: str, bits: int) -> Tensor:
    """`block_float_forward`, or with a gradient `block_float_backward`, in the dtype of `x`."""
    form = BLOCK_FORMATS[name, bits]
    return in_dtype(block_float_forward(x, form, t) if grad is None else block_float_backward(grad, x, form, t), x.dtype)


@operator("(Tensor x, Tensor? t, Tensor? grad, str name, int bits) -> Tensor")
def round_blocks(x: Tensor, t: Tensor | None, grad: Tensor | None, name: str, bits: int) -> Tensor:
    """`round_blocks_formula`."""
    function = _library() if type(x) in PLAIN and x.is_cpu and x.numel() else None
    if function is None:
        return round_blocks_formula(x, t, grad, name, bits)
    return in_dtype(_run(function, x, t, grad, BLOCK_FORMATS[name, bits]), x.dtype)


class BlockFloatKernel(BlockFloatFunction):
    """`BlockFloatFunction` by `round_blocks`."""

    @staticmethod
    def forward(x: Tensor, t: Tensor | None, form: tuple[str, int]) -> Tensor:  # type: ignore[override]
        """As there."""
        return round_blocks(x, t, None, *form)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """As there; what is differentiated once more is made of operations that autograd knows."""
        x, t = ctx.saved_tensors
        made = round_blocks_formula if torch.is_grad_enabled() else round_blocks
        return made(x, t, grad, *ctx.form), None, None
