"""Floats in blocks that share a scale, in one pass over memory on a CPU; elsewhere by the formula, which compilers see."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.functional.block_floats import BLOCK_FORMATS, BlockFloatFunction, BlockFormat
from qat.functional.block_floats import round_blocks as formula
from qat.functional.ste import in_dtype
from qat.kernels import compile_cpp, cpu
from qat.kernels.library import operator, works
from qat.kernels.rows import PLAIN

_P, _N, _F = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float


@functools.cache
def _compiled() -> Any:
    """That of blocks.cpp."""
    function = compile_cpp.load(Path(__file__).with_name("blocks.cpp").read_text()).round_blocks
    function.argtypes, function.restype = (_P, _P, _P, _N, _N, _N, _F, _F, _F, _P, ctypes.c_int), None
    return function


@functools.cache
def _function() -> Any:
    """`_compiled`, None where compiled code cannot be had, or rounds in another way."""
    return _compiled() if cpu.available() and works("C++ for floats in blocks", lambda: callable(_compiled())) else None


def _form(t: Tensor | None, bits: int) -> BlockFormat:
    return BLOCK_FORMATS["mxfp" if t is None else "nvfp4", bits]


def round_blocks_formula(x: Tensor, t: Tensor | None, grad: Tensor | None, bits: int) -> Tensor:
    """`qat.functional.block_floats.round_blocks`."""
    return formula(x, _form(t, bits), t, grad)


@operator("(Tensor x, Tensor? t, Tensor? grad, int bits) -> Tensor")
def round_blocks(x: Tensor, t: Tensor | None, grad: Tensor | None, bits: int) -> Tensor:
    """`round_blocks_formula`."""
    function = _function() if type(x) in PLAIN and x.is_cpu and x.numel() else None
    if function is None:
        return round_blocks_formula(x, t, grad, bits)
    form, length, values = _form(t, bits), x.shape[-1], x.float().contiguous()
    upstream, out = None if grad is None else grad.float().contiguous(), torch.empty_like(values)
    function(
        values.data_ptr(), None if upstream is None else upstream.data_ptr(), out.data_ptr(), x.numel() // length, length, form.block,
        2.0**-form.mantissa, 2.0**form.lowest, form.highest, None if t is None else t.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return in_dtype(out, x.dtype)


class BlockFloatKernel(BlockFloatFunction):
    """`BlockFloatFunction` by `round_blocks`."""

    @staticmethod
    def forward(x: Tensor, t: Tensor | None, form: BlockFormat) -> Tensor:
        """As there."""
        return round_blocks(x, t, None, form.bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """As there; what is differentiated once more is made of operations that autograd knows."""
        x, t = ctx.saved_tensors
        made = round_blocks_formula if torch.is_grad_enabled() else round_blocks
        return made(x, t, grad, ctx.form.bits), None, None
