"""Reference for the kernels of LSQ, StatsQ and block floats, and a comparison of LSQ kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.functional.block_floats import BLOCK_FORMATS, BlockFormat
from qat.functional.block_floats import round_blocks as reference_round_blocks
from qat.functional.lsq import CodeRange, lsq_backward, lsq_forward
from qat.functional.statsq import statsq_forward
from qat.kernels.producer import Producer
from qat.kernels.rows import LSQParams, operator_args

__all__ = ["kernels_agree", "lsq_backward", "lsq_forward", "round_blocks", "statsq_forward"]


def block_format(tensor_scale: Tensor | None, bits: int) -> BlockFormat:
    """The format of `bits` bits: a two-level format if the whole tensor has a scale."""
    return BLOCK_FORMATS["mxfp" if tensor_scale is None else "nvfp4", bits]


def round_blocks(x: Tensor, tensor_scale: Tensor | None, grad: Tensor | None, bits: int) -> Tensor:
    """`qat.functional.block_floats.round_blocks`."""
    return reference_round_blocks(x, block_format(tensor_scale, bits), tensor_scale, grad)


@torch.no_grad()
def kernels_agree(
    forward: Callable[..., Any], backward: Callable[..., Any], device: str, *code_ranges: CodeRange
) -> bool:
    """True if LSQ kernels agree with the reference: exactly, or in scale gradients up to rounding.

    False also if they do not support the tensors. Gradients of offsets are not compared. Inputs
    include values inside and outside of the range.

    Args:
        forward: `lsq_forward` of `cpu` or `gpu`.
        backward: `lsq_backward` of the same module.
        device: device of the inputs.
        code_ranges: ranges to compare, whose axis is 1; the tensors have shape (3, 4, 37).
    """
    x = torch.linspace(-9, 9, 4 * 37 * 3, device=device, dtype=torch.float32).reshape(3, 4, 37)
    scale = torch.tensor([0.5, 1.0, 0.3, 2.0], device=device, dtype=torch.float32)
    offset = x.flatten()[:37]
    for codes in code_ranges:
        q = LSQParams(scale, offset, offset, None, codes)
        grad_x = torch.empty_like(x)
        results = backward(
            grad=x,
            x=x,
            q=q,
            out=grad_x,
            dequantized=torch.float32,
            weight=None,
            bias=None,
            producer=Producer(),
            with_after=False,
        )
        if results is None:  # the kernels do not support these tensors
            return False
        grad_scale, _, dequantized = results
        expected = lsq_backward(x, x, scale, offset, codes)
        if not torch.allclose(grad_scale, expected.scale, rtol=1e-4, atol=1e-3):
            return False
        if not torch.equal(grad_x, expected.x):
            return False
        expected_y = lsq_forward(x, scale, offset, offset, codes)
        y = forward(x, *operator_args(q), torch.float32)
        if not (torch.equal(dequantized, expected_y) and torch.equal(y, expected_y)):
            return False
    return True
